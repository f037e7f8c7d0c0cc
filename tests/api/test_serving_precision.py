"""merge: the base is chosen by the measured task loss, in 16 bits and requantized to NF4."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.api.merge import merge
from lorafit.api.ship import merge_proof
from lorafit.backbone import load_backbone, nf4_config
from lorafit.demo import BASE
from lorafit.errors import BackboneError, UsageError
from lorafit.export.merge import requantized
from lorafit.methods import method_of
from tiny_models import some_ids


@pytest.fixture(scope="module")
def decided(tiny_run, tmp_path_factory):
    return merge(tiny_run.run.path, out=tmp_path_factory.mktemp("decided") / "model")


def losses(merged):
    return {(row.onto, row.precision == "nf4"): row.measured.loss for row in merged.precisions.rows}


def test_the_base_is_chosen_by_both_rows_and_the_choice_is_written(decided):
    """On the bundled base the quantized merge is better in 16 bits, and its delta is rounded away in NF4."""
    found = losses(decided)
    assert set(found) == {(onto, nf4) for onto in ("quantized", "original") for nf4 in (False, True)}
    assert decided.passed and decided.precisions.onto == decided.report.onto == decided.verification.onto == "quantized"
    assert found["quantized", False] + 0.02 < found["original", False]
    assert found["quantized", True] > found["original", True] + 1
    assert "nf4" not in decided.precisions.good_for and "serve it in 16 bits" in decided.precisions.sentence
    written = json.loads((decided.folder / "verification.json").read_text())
    assert written["decision"]["onto"] == "quantized" and "task loss" in written["decision"]["reason"]
    assert {(row["onto"], row["precision"] == "nf4"): row["loss"] for row in written["precisions"]} == found
    assert written["good_for"] == decided.precisions.good_for
    card = (decided.folder / "README.md").read_text()
    assert "## Serving precision" in card and card.count("| quantized |") == card.count("| original |") == 2


def test_the_original_is_taken_where_its_loss_is_as_good_and_both_rows_are_kept(
    tiny_run, decided, tmp_path, monkeypatch
):
    monkeypatch.setattr(merge_proof, "AS_GOOD", 0.6)
    merged = merge(tiny_run.run.path, out=tmp_path / "model")
    assert merged.report.onto == merged.verification.onto == "original" and merged.passed
    assert "as good as" in merged.precisions.reason
    assert merged.verification.exact is not None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # the base that is not written has the rows of the one that is; in bf16 adapter and merge round in other places
    first, second = losses(decided), losses(merged)
    assert second.pop(("quantized", False)) == pytest.approx(first.pop(("quantized", False)), abs=0.05)
    assert {key: pytest.approx(loss, abs=1e-4) for key, loss in first.items()} == second


def test_a_merge_requantized_in_memory_is_the_one_that_loads_in_four_bits_from_disk(tiny_run, decided, tmp_path):
    merged = merge(tiny_run.run.path, onto="quantized", out=tmp_path / "model")
    folder, alone, second = merged.folder, merged.verification, decided.verification
    # what the first of two candidates measured of the live model is what each measures of it alone
    assert (second.onto, second.rows) == (alone.onto, alone.rows) == ("quantized", second.rows)
    assert second.floor.kl == pytest.approx(alone.floor.kl) and second.base.kl == pytest.approx(alone.base.kl)
    assert second.merged.kl == pytest.approx(alone.merged.kl)
    assert [proof.answers for proof in decided.proofs] == [proof.answers for proof in merged.proofs]
    config = tiny_run.resolved.config
    trained = method_of(config).trained_weights(tiny_run.run.adapter, config)
    ids = some_ids()
    with torch.no_grad():
        in_memory = requantized(config, "quantized", trained)(ids).logits
        on_disk = load_backbone(config.model_copy(update={"base": str(folder)}))(ids).logits
    assert torch.equal(in_memory, on_disk)


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory):
    """A run over a base that transformers saved in bitsandbytes' 4 bits."""
    from little_run import write_rows
    from lorafit.api.train import train

    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=nf4_config(torch.float32), device_map="cpu")
    shutil.copytree(BASE, folder / "base-bnb-4bit")
    (folder / "base-bnb-4bit" / "model.safetensors").unlink()
    model.save_pretrained(folder / "base-bnb-4bit")
    data = write_rows(folder / "rows.jsonl", 40)
    settings = {"lr": 5e-3, "max_steps": 8, "holdout": 0.2, "examples_per_step": 8}
    return train(data, str(folder / "base-bnb-4bit"), out=folder / "run", **settings).run


def test_a_base_in_four_bits_is_merged_as_it_is_and_said_to_be_for_sixteen(packed_run):
    merged = merge(packed_run.path)
    assert merged.report.onto == "quantized" and merged.passed
    assert "the base exists in 4 bits only" in merged.precisions.sentence
    assert len(merged.precisions.rows) == 2


def test_the_advice_for_a_base_in_four_bits_works_when_it_is_followed(packed_run, tmp_path):
    with pytest.raises(BackboneError, match=r"exists in 4 bits only.*pass --base with the 16-bit model"):
        merge(packed_run.path, onto="original", out=tmp_path / "model")
    merged = merge(packed_run.path, onto="original", base=str(BASE), out=tmp_path / "model")
    assert merged.passed and merged.report.onto == "original"
    assert max(losses(merged).values()) < merged.verification.base.loss - 0.5
    written = json.loads((merged.folder / "verification.json").read_text())
    assert written["onto_base"]["base"] == str(BASE) and len(written["onto_base"]["sha256"]) == 64
    assert "a 16-bit model that was not trained over" in (merged.folder / "README.md").read_text()
    stored = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert getattr(stored.config, "quantization_config", None) is None


def test_another_model_than_the_twin_is_refused_before_anything_is_written(packed_run, tmp_path, base_of_family):
    with pytest.raises(BackboneError, match="is not the 16-bit original of the run's base"):
        merge(packed_run.path, onto="original", base=str(base_of_family), out=tmp_path / "model")
    packed = packed_run.config().base
    with pytest.raises(BackboneError, match="the model to merge onto exists in 4 bits only"):
        merge(packed_run.path, onto="original", base=packed, out=tmp_path / "model")
    with pytest.raises(UsageError, match="leave --base out"):
        merge(packed_run.path, onto="quantized", base=str(BASE), out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.fixture
def base_of_family(tmp_path):
    from tiny_models import save_base

    return save_base(tmp_path / "other", "llama", torch.float32)
