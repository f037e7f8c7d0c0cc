import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from lorafit.backbone import FrozenLinear4bit, compute_dtype, load_backbone
from lorafit.config import RunConfig
from lorafit.errors import BackboneError
from tiny_models import FAMILIES, save_base, some_ids


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def broken(base, tmp_path):
    """A copy of the base to break."""
    return shutil.copytree(base, tmp_path / "broken")


def config_for(folder, **settings):
    return RunConfig(base=str(folder), **settings)


def refuses(folder, *words, **settings):
    with pytest.raises(BackboneError) as caught:
        load_backbone(config_for(folder, **settings))
    assert all(word in caught.value.sentence for word in words), caught.value.sentence
    assert "\n" not in caught.value.sentence


def test_everything_is_frozen_and_every_linear_but_the_head_is_in_4_bits(base):
    model = load_backbone(config_for(base))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is model.config.get_text_config().use_cache is False
    kinds = {name.rsplit(".", 1)[-1]: type(m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert len(kinds) == 7 and set(kinds.values()) == {FrozenLinear4bit}
    state = model.model.layers[0].self_attn.q_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested and state.blocksize == 64


def test_logits_are_those_of_transformers_and_bitsandbytes(base):
    ours = load_backbone(config_for(base))
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=quantisation)
    ids = some_ids()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-5)


def test_without_quantisation_the_logits_are_those_of_the_checkpoint(base):
    ours = load_backbone(config_for(base, quantization="none"))
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(ours(some_ids()).logits, theirs(some_ids()).logits)
    assert not any(isinstance(module, FrozenLinear4bit) for module in ours.modules())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_the_rest_is_in_the_compute_dtype_and_the_4_bits_do_not_depend_on_it(base, compute):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[compute]
    model = load_backbone(config_for(base, compute=compute))
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == dtype
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    reference = load_backbone(config_for(base))
    for ours, theirs in zip(model.modules(), reference.modules()):
        if isinstance(ours, FrozenLinear4bit):
            assert ours.compute_dtype == dtype
            assert torch.equal(ours.weight.data, theirs.weight.data)
    assert model(some_ids()).logits.dtype == dtype


def test_auto_compute_is_fp32_on_a_cpu():
    assert compute_dtype(RunConfig(), "cpu") == torch.float32
    assert compute_dtype(RunConfig(compute="bf16"), "cpu") == torch.bfloat16


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_compute_on_a_gpu_is_bf16_where_it_has_it_else_fp16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    assert compute_dtype(RunConfig(), "cuda:0") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_loads_and_its_packed_bytes_survive_a_forward_in_both_modes(tmp_path, family):
    model = load_backbone(config_for(save_base(tmp_path / family, family)))
    linears = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    before = [linear.weight.data.clone() for linear in linears]
    model.train()
    trained = model(some_ids()).logits
    model.eval()
    with torch.inference_mode():
        evaluated = model(some_ids()).logits
    assert torch.isfinite(trained).all() and torch.isfinite(evaluated).all()
    assert linears and all(torch.equal(linear.weight.data, old) for linear, old in zip(linears, before))


def test_a_prequantised_base_loads_as_it_is(base, tmp_path):
    model = load_backbone(config_for(base))
    model.save_pretrained(tmp_path / "packed")
    again = load_backbone(config_for(tmp_path / "packed"))
    assert torch.equal(again(some_ids()).logits, model(some_ids()).logits)
    refuses(tmp_path / "packed", "already in 4 bits", quantization="none")


def test_pickled_weights_are_refused_with_the_way_to_convert(broken):
    for path in broken.glob("*.safetensors*"):
        path.unlink()
    refuses(broken, "no model.safetensors")
    (broken / "pytorch_model.bin").write_bytes(b"x")
    refuses(broken, "pickled", "save_pretrained")


def test_a_family_without_linear_layers_is_one_sentence(tmp_path):
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    refuses(tmp_path / "gpt2", "no torch.nn.Linear layer")


def test_a_single_file_is_taken_before_an_index_as_transformers_does(broken):
    whole = {name: t for path in broken.glob("*.safetensors") for name, t in load_file(path).items()}
    save_file(whole, broken / "model.safetensors", metadata={"format": "pt"})
    sorted(broken.glob("model-*.safetensors"))[0].unlink()
    load_backbone(config_for(broken))


def test_a_truncated_shard_is_named(broken):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    refuses(broken, shard.name, "truncated")
    shard.write_bytes(b"\xff" * 100)
    refuses(broken, shard.name, "truncated")
    shard.write_bytes(b"")
    refuses(broken, shard.name, "truncated")


def test_a_missing_shard_is_named(broken):
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(broken, shard.name, "not in the folder")


def test_a_broken_index_is_named(broken):
    index = broken / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text("{")
    refuses(broken, index.name)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../secret.safetensors"}}))
    refuses(broken, "outside the folder")
    shard = next(iter(good["weight_map"].values()))
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {"model.extra.weight": shard}}))
    refuses(broken, "model.extra.weight")


def test_a_tensor_that_no_shard_holds_is_an_error_and_no_random_weight(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuses(broken, "lacks", "layers.2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate_size": 97}, ["but config.json says", "97"]),
        ({"num_attention_heads": 8}, ["but config.json says"]),
        ({"num_attention_heads": 8, "quantization": "none"}, ["other shapes than config.json says"]),
        ({"num_hidden_layers": 1}, ["layers that its config.json does not count (9"]),
        ({"vocab_size": 300}, ["other shapes than config.json says"]),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_sentence(broken, change, words):
    settings = {key: change.pop(key) for key in ("quantization",) if key in change}
    path = broken / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refuses(broken, *words, **settings)


def test_code_from_the_checkpoint_is_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    odd = config | {"model_type": "my_model", "auto_map": {"AutoModelForCausalLM": "modeling.MyModel"}}
    (broken / "config.json").write_text(json.dumps(odd))
    refuses(broken, "Python code", "my_model")
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "my_model"}))
    refuses(broken, "does not support the model type 'my_model'")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "t5"}, "no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "already quantized"),
        ({"hidden_size": "many"}, "config.json is not valid"),
    ],
)
def test_a_config_of_the_wrong_kind_is_one_sentence(broken, change, word):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    refuses(broken, word)


def test_a_config_that_is_no_json_is_one_sentence(broken):
    (broken / "config.json").write_text("nope")
    refuses(broken, "config.json", "is not valid JSON")
    (broken / "config.json").write_text("[]")
    refuses(broken, "is not a JSON object")


def test_an_adapter_in_the_bases_folder_is_not_loaded_in_silence(broken):
    (broken / "adapter_config.json").write_text("{}")
    refuses(broken, "adapter_config.json")
