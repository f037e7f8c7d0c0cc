"""train: a base that loses by quantization is told so before training, and a usual one is not."""

import pytest
import torch

from little_run import write_rows
from lorafit.api.merge import merge
from lorafit.api.train import train
from lorafit.backbone import load_backbone, with_stored_weights
from lorafit.demo import BASE
from lorafit.evaluate.rounding_check import quantization_loss
from tiny_models import some_ids


def codes(trained):
    return [finding.code for finding in trained.findings]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that has moved its base far."""
    folder = tmp_path_factory.mktemp("taught")
    data = write_rows(folder / "rows.jsonl", 60)
    settings = {"lr": 5e-3, "max_steps": 16, "holdout": 0.2, "examples_per_step": 8}
    return train(data, str(BASE), out=folder / "run", **settings)


@pytest.fixture(scope="module")
def merged(taught, tmp_path_factory):
    """The run merged onto its base, as it was trained on and as it was stored."""
    folder = tmp_path_factory.mktemp("merged")
    return {onto: merge(taught.run.path, onto=onto, out=folder / onto).folder for onto in ("quantized", "original")}


def again(taught, merged, folder, **settings):
    (data,) = taught.resolved.config.data
    given = {"max_steps": 1, "lr": 1e-12, "holdout": 0.2, "examples_per_step": 48, "dropout": 0.0, **settings}
    return train(data, str(merged), out=folder / "second", **given)


def test_a_second_run_over_a_quantized_merge_starts_where_it_ended_or_is_warned(taught, merged, tmp_path):
    assert "S006" not in codes(taught), "the bundled base itself loses nothing to speak of"
    second = again(taught, merged["quantized"], tmp_path)
    (finding,) = (each for each in second.findings if each.code == "S006")
    assert second.loss > taught.eval_loss + 1, "the delta is rounded away"
    assert "quantization: none" in finding.fix and "--onto original" in finding.fix


@pytest.mark.slow
def test_the_fixes_of_the_finding_work_when_they_are_followed(taught, merged, tmp_path):
    original = again(taught, merged["original"], tmp_path / "a")
    assert "S006" not in codes(original)
    plain = again(taught, merged["quantized"], tmp_path / "b", quantization="none")
    assert "S006" not in codes(plain)
    start = again(taught, merged["original"], tmp_path / "c", quantization="none").loss
    assert plain.loss == pytest.approx(original.loss, abs=0.3) and start < taught.eval_loss + 1


def test_stored_weights_give_the_logits_of_the_unquantized_base_and_leave_no_trace(taught):
    config, ids = taught.resolved.config, some_ids()
    model = load_backbone(config)
    plain = load_backbone(config.model_copy(update={"quantization": "none"}))
    with torch.no_grad():
        before = model(ids).logits
        with with_stored_weights(model, BASE) as has_weights:
            assert has_weights
            assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model(ids).logits, before) and not torch.equal(before, plain(ids).logits)


def test_the_measurement_moves_neither_the_random_streams_nor_the_mode(taught):
    config = taught.resolved.config
    model = load_backbone(config)
    model.train()
    state = torch.random.get_rng_state()
    assert list(quantization_loss(model, config, taught.train_rows)) == []
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
