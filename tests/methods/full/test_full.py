"""Full fine-tuning keeps the promises of a training method."""

import json

import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import RunConfig, resolve
from lorafit.errors import AdapterError, UsageError, VerificationError
from lorafit.methods import METHODS, method_of
from tiny_models import save_base, some_ids

FULL = METHODS["full"]
KINDS = ["llama-tied", "gemma3", "qwen3_moe"]


@pytest.fixture(scope="module", params=["llama", *KINDS])
def config(request, tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base") / request.param, request.param)
    return RunConfig(base=str(base), method="full")


@pytest.fixture
def trained(config):
    """The model after one large step of SGD."""
    model = FULL.prepare(load_backbone(config), config)
    model(some_ids(), labels=some_ids()).loss.backward()
    torch.optim.SGD(FULL.trainable(model), lr=0.5).step()
    return model.eval()


def answers(model):
    with torch.no_grad():
        return model(some_ids()).logits


def test_the_settings_choose_the_method_and_its_defaults(config):
    assert method_of(config) is FULL
    assert (config.quantization, config.lr) == ("none", 2e-5)
    assert resolve(flags={"method": "full", "lr": 1e-4}).config.lr == 1e-4
    assert resolve(recipe={"finetuning_type": "full"}).config.method == "full"


def test_quantization_and_full_fine_tuning_exclude_each_other():
    with pytest.raises(UsageError, match="method is full, which trains every weight, and quantization is nf4") as error:
        resolve(flags={"method": "full", "quantization": "nf4"})
    assert error.value.fix == "set quantization: none, or method: lora"
    assert resolve(flags={"quantization": "none", "method": "full"}).config.method == "full"


def test_every_weight_of_the_text_model_trains_and_no_tower(trained):
    frozen = {name for name, weight in trained.named_parameters() if not weight.requires_grad}
    assert all("vision" in name or "multi_modal" in name for name in frozen)
    assert len(FULL.trainable(trained)) == len(list(trained.parameters())) - len(frozen)
    assert all(weight.grad is not None for weight in FULL.trainable(trained))


def test_a_base_in_four_bits_is_refused(config):
    quantized = config.model_copy(update={"method": "lora", "quantization": "nf4"})
    with pytest.raises(AdapterError, match="is quantized, so it cannot be trained"):
        FULL.prepare(load_backbone(quantized), quantized)


def test_a_snapshot_restores_the_weights_it_was_taken_of(trained, config, tmp_path):
    FULL.snapshot(trained, config).write(tmp_path)
    other = FULL.prepare(load_backbone(config), config).eval()
    FULL.restore(other, tmp_path)
    assert torch.equal(answers(other), answers(trained))
    loaded = FULL.load(load_backbone(config), tmp_path, config)  # a checkpoint answers and exports like the result
    assert torch.equal(answers(loaded), answers(trained)) and len(FULL.trained_weights(tmp_path, config)) > 0


def test_what_is_saved_loads_in_transformers_and_here(trained, config, tmp_path):
    from transformers import AutoModelForCausalLM

    FULL.save(trained, tmp_path / "model", config)
    assert FULL.is_finished(tmp_path / "model") and not FULL.is_finished(tmp_path)
    again = FULL.load(load_backbone(config), tmp_path / "model", config)
    assert torch.equal(answers(again), answers(trained))
    assert FULL.trainable(again) == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert torch.allclose(answers(theirs), answers(trained), atol=1e-5)
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings.get("use_cache", True) and settings.get("text_config", {}).get("use_cache", True)


def test_without_and_detach_give_the_bases_own_answers(trained, config):
    base, tuned = answers(load_backbone(config)), answers(trained)
    assert not torch.equal(tuned, base)
    for _ in range(2):
        with FULL.without(trained):
            assert torch.equal(answers(trained), base)
        assert torch.equal(answers(trained), tuned)
    detached = FULL.detach(trained)
    assert torch.equal(answers(detached), base)
    assert FULL.trainable(detached) == []


def test_a_model_that_was_not_trained_is_found_out(trained, config, tmp_path):
    FULL.save(FULL.prepare(load_backbone(config), config), tmp_path / "model", config)
    with pytest.raises(VerificationError, match="every weight is the base's own"):
        FULL.trained_weights(tmp_path / "model", config)
    FULL.save(trained, tmp_path / "model", config)
    assert len(FULL.trained_weights(tmp_path / "model", config)) > 0


def test_a_weight_that_is_not_finite_is_neither_saved_nor_loaded(trained, config, tmp_path):
    with torch.no_grad():
        FULL.trainable(trained)[-1].view(-1)[0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        FULL.save(trained, tmp_path / "other", config)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        FULL.snapshot(trained, config).require_finite(tmp_path)
    assert not (tmp_path / "other").exists()
    FULL.snapshot(trained, config).write(tmp_path / "damaged")
    with pytest.raises(AdapterError, match="NaN or infinite values: the model is not loaded"):
        FULL.load(load_backbone(config), tmp_path / "damaged", config)
