"""Adapters on experts: PEFT's own numbers, files and merge, over experts in 4 bits."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.backbone import FrozenExpertsLinear, frozen_weights, load_backbone
from lorafit.config import resolve
from lorafit.errors import AdapterError
from lorafit.methods.lora import Deltas, attach, load_adapter, restore_adapter, save_adapter
from lorafit.runs.initial_adapter import InitialAdapter
from tiny_models import save_small, some_ids, stir

# a fused gate; biases, and matrices that lie transposed; no gate; dense and shared feed-forwards beside experts
KINDS = ("qwen3_moe", "gpt_oss", "nemotron_h", "glm4_moe")


def settings(base, **more):
    flags = {"base": base, "dropout": 0.0, "rank": 8, "targets": "all-linear+experts", **more}
    return resolve(flags=flags).config


def base_of(config):
    return load_backbone(config, attn_implementation="eager")


def plain_model(base, ours):
    """transformers' own model with the dequantized weights of `ours`, in fp32."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, layer in frozen_weights(ours.get_base_model()).items():
            dense = layer.stacked() if isinstance(layer, FrozenExpertsLinear) else layer.unpacked()
            weights[name.replace(".base_layer", "")].copy_(dense)
    return plain


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=some_ids(40), use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_files_and_merge_are_those_of_plain_peft(kind, tmp_path):
    config = settings(save_small(tmp_path / "base", kind))
    ours = attach(base_of(config), config)
    fresh = {name: weight.clone() for name, weight in ours.state_dict().items() if ".lora_" in name}
    stir(ours)
    save_adapter(ours, tmp_path / "adapter", config, base_name=config.base)
    theirs = peft.PeftModel.from_pretrained(plain_model(config.base, ours), tmp_path / "adapter", is_trainable=True)
    losses = []
    for model in (ours, theirs):
        ids = some_ids(40)
        losses.append(model.train()(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)
    wanted = {name: weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    mine = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    assert mine.keys() == wanted.keys() and any("experts.base_layer.lora_A" in name for name in mine)
    for name, gradient in wanted.items():
        assert float((mine[name] - gradient).norm() / gradient.norm()) < 1e-5, name

    tuned, bare = logits(ours), logits(base_of(config))
    assert float((tuned - bare).abs().max()) > 0.1
    with ours.disable_adapter():
        assert torch.equal(logits(ours), bare)
    loaded = load_adapter(base_of(config), tmp_path / "adapter")
    assert torch.equal(logits(loaded), tuned)
    assert torch.equal(logits(loaded.unload()), bare)
    ours.load_state_dict(fresh, strict=False)
    assert torch.equal(logits(ours), bare)  # B is zero at first
    restore_adapter(ours, tmp_path / "adapter")
    assert torch.equal(logits(ours), tuned)

    deltas = Deltas.from_folder(tmp_path / "adapter", config)
    merged = plain_model(config.base, ours)
    for name, weight in merged.named_parameters():
        weight.data.copy_(deltas.merged(name, weight.data))
    deltas.check_found(name for name, _ in merged.named_parameters())
    for model in (merged, ours.merge_and_unload()):
        assert float((logits(model) - tuned).abs().max() / tuned.abs().max()) < 1e-5


def test_the_adapters_of_a_tokens_experts_share_the_rank_and_have_the_common_scale(tmp_path):
    config = settings(save_small(tmp_path / "base", "qwen3_moe"), dropout=0.1)
    adapted = attach(base_of(config), config)
    save_adapter(adapted, tmp_path / "adapter", config, base_name=config.base)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = ["experts.down_proj", "experts.gate_up_proj"]
    assert written["target_parameters"] == names and written["lora_dropout"] == 0
    assert written["rank_pattern"] == dict.fromkeys(names, 4)  # two experts a token
    assert written["alpha_pattern"] == dict.fromkeys(names, 4 * config.scale)
    dropped = [module for module in adapted.modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.1]
    assert len(dropped) == 4 * 4  # of attention's projections, in each of four layers


def test_a_file_with_other_ranks_or_scales_is_refused(tmp_path):
    config = settings(save_small(tmp_path / "base", "qwen3_moe"))
    save_adapter(attach(base_of(config), config), tmp_path / "adapter", config, base_name=config.base)
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    for change, message in (
        ({"alpha_pattern": {"experts.down_proj": 99.0}}, "more than one rank"),
        ({"alpha_pattern": dict.fromkeys(written["target_parameters"], 99.0)}, "a scale of their own"),
        ({"rank_pattern": {"q_proj": 4}}, "for linear modules"),
    ):
        path.write_text(json.dumps(written | change))
        with pytest.raises(AdapterError, match=message):
            load_adapter(base_of(config), tmp_path / "adapter")


def test_feed_forwards_beside_experts_are_written_as_parameters_and_read_as_modules(tmp_path):
    config = settings(save_small(tmp_path / "base", "deepseek_v3"), targets="q_a_proj,up_proj", dropout=0.1)
    save_adapter(attach(base_of(config), config), tmp_path / "adapter", config, base_name=config.base)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    shared = [f"model.layers.{layer}.mlp.shared_experts.up_proj.weight" for layer in (1, 2, 3)]
    assert written["target_parameters"] == ["model.layers.0.mlp.up_proj.weight", *shared]
    assert written["target_modules"] == ["q_a_proj"] and written["lora_dropout"] == 0
    assert InitialAdapter(tmp_path / "adapter", None).settings().targets[0] == "model.layers.0.mlp.up_proj"
    with pytest.raises(AdapterError, match="which PEFT adapts as a parameter"):
        attach(base_of(config), config.model_copy(update={"dora": True}))


def test_dora_has_no_adapters_on_experts(tmp_path):
    config = settings(save_small(tmp_path / "base", "qwen3_moe"), dora=True)
    with pytest.raises(AdapterError, match="DoRA has no adapters on experts"):
        attach(base_of(config), config)
