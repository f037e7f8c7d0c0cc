"""LoRA keeps the promises of a training method."""

import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import RunConfig
from lorafit.errors import AdapterError, VerificationError
from lorafit.methods import METHODS, method_of
from tiny_models import save_base, some_ids, stir

LORA = METHODS["lora"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return RunConfig(base=str(save_base(tmp_path_factory.mktemp("base") / "llama")), dropout=0.0, rank=4, alpha=8.0)


@pytest.fixture
def trained(config):
    model = LORA.prepare(load_backbone(config), config)
    stir(model)
    return model.eval()


@pytest.fixture
def saved(trained, config, tmp_path):
    LORA.save(trained, tmp_path / "adapter", config)
    return tmp_path / "adapter"


def answers(model):
    with torch.no_grad():
        return model(some_ids()).logits


def test_the_settings_choose_the_method(config):
    assert method_of(config) is LORA
    assert LORA.describe(config) == "LoRA (rank 4, alpha 8)"


def test_only_the_adapters_weights_are_trainable(trained):
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    assert all(".lora_" in names[id(parameter)] for parameter in LORA.trainable(trained))
    assert len(LORA.trainable(trained)) == 8


def test_a_snapshot_restores_the_weights_it_was_taken_of(trained, config, tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    LORA.snapshot(trained, config).write(folder)
    other = LORA.prepare(load_backbone(config), config).eval()
    LORA.restore(other, folder)
    assert torch.equal(answers(other), answers(trained))


def test_without_and_detach_give_the_bases_own_answers(trained, config):
    base, tuned = answers(load_backbone(config)), answers(trained)
    assert not torch.equal(tuned, base)
    with LORA.without(trained):
        assert torch.equal(answers(trained), base)
    assert torch.equal(answers(trained), tuned)
    detached = LORA.detach(trained)
    assert torch.equal(answers(detached), base)
    assert not any(".lora_" in name for name, _ in detached.named_parameters())


def test_what_is_saved_is_finished_and_loads_frozen(trained, saved, config, tmp_path):
    assert LORA.is_finished(saved)
    again = LORA.load(load_backbone(config), saved, config)
    assert torch.equal(answers(again), answers(trained))
    assert LORA.trainable(again) == []
    (saved / "adapter_config.json").unlink()
    assert not LORA.is_finished(saved) and not LORA.is_finished(tmp_path / "nothing")


@pytest.mark.parametrize(("changes", "words"), [({"rank": 8, "alpha": 16.0}, "rank 4"), ({"alpha": 16.0}, "scale 2")])
def test_weights_of_other_settings_than_the_runs_are_refused(saved, config, changes, words):
    other = config.model_copy(update=changes)
    for open_it in (lambda: LORA.load(load_backbone(config), saved, other), lambda: LORA.trained_weights(saved, other)):
        with pytest.raises(AdapterError, match=f"the adapter has {words}, but the run was trained with"):
            open_it()


def test_trained_weights_merge_into_the_base(trained, saved, config):
    weights = LORA.trained_weights(saved, config)
    layer = trained.get_base_model().model.layers[0].self_attn.q_proj
    name, base = "model.layers.0.self_attn.q_proj.weight", torch.randn(64, 64)
    assert len(weights) == 4
    torch.testing.assert_close(weights.merged(name, base), base + layer.get_delta_weight("default"))
    assert weights.merged("model.norm.weight", base) is base
    with pytest.raises(VerificationError, match="not in the base"):
        weights.check_found([name])
