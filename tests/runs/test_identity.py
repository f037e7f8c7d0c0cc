"""What must stay the same for a run to go on, and what may change."""

import json

import pytest

from lorafit.config import RunConfig, resolve
from lorafit.errors import RunDirError
from lorafit.runs import FREE, RunFingerprint, RunIdentity, held_settings

HELD = {
    "method", "objective", "quantization", "compute", "rank", "alpha", "rslora", "dora", "loraplus_lr_ratio",
    "init_lora_weights", "trainable_tokens", "new_tokens", "modules_to_save", "shard_base",
    "dropout", "targets", "lr", "schedule", "warmup", "weight_decay", "max_grad_norm", "optimizer", "epochs",
    "max_steps", "examples_per_step", "on_spike", "seed",
}  # fmt: skip


ODD = (
    '{"run": 1, "fingerprint": {"odd": 1}}',
    '{"run": "x", "environment": {}, "fingerprint": {"train_rows": 1, "held_out_rows": 2, "template": 3, "base": 4}}',
    '{"run": "x", "environment": 7, "fingerprint": {}}',
)


def fingerprint(**given):
    content = {"train_rows": "a" * 64, "held_out_rows": "b" * 64, "template": "c" * 64, "base": "d" * 64}
    return RunFingerprint(**{**content, "settings": held_settings(resolve(flags=given).config)})


def test_every_setting_is_either_held_or_free_and_each_is_a_decision():
    """A new setting is held until it is put among the free ones: make the decision in fingerprint.py, then here."""
    assert set(RunConfig.model_fields) - FREE == HELD
    assert set(RunConfig.model_fields) >= FREE


@pytest.mark.parametrize(
    "key", ["max_length", "save_steps", "save_minutes", "keep_last", "compile", "gpu_memory", "report_to", "out"]
)
def test_what_changes_only_layout_speed_or_what_is_kept_is_free(key):
    value = {"gpu_memory": "8GiB", "report_to": "wandb", "out": "x", "compile": "off"}.get(key, 64)
    assert fingerprint().differences(fingerprint(**{key: value})) == []


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("seed", 3), ("targets", "all-linear"), ("epochs", 1.0)])
def test_a_held_setting_is_named_with_both_values(key, value):
    then, now = fingerprint(), fingerprint(**{key: value})
    assert then.differences(now) == [(key, str(then.settings[key]), str(value))]


def test_content_is_named_in_words():
    other = RunFingerprint(**{**fingerprint().to_dict(), "train_rows": "e" * 64})
    assert fingerprint().differences(other) == [("the training rows", "sha256 " + "a" * 12, "sha256 " + "e" * 12)]


@pytest.mark.parametrize("key", ["method", "objective", "dropout"])
def test_a_setting_that_an_older_release_did_not_know_had_its_default(key):
    fields = fingerprint().to_dict()
    del fields["settings"][key]
    assert RunFingerprint.from_dict(fields).differences(fingerprint()) == []


def test_another_value_than_the_default_differs_from_a_run_that_did_not_know_the_setting():
    fields = fingerprint().to_dict()
    del fields["settings"]["dropout"]
    then, now = RunFingerprint.from_dict(fields), fingerprint(dropout=0.5)
    assert then.differences(now) == [("dropout", "0.05", "0.5")]


def test_a_setting_that_this_release_does_not_know_is_a_difference():
    fields = fingerprint().to_dict()
    fields["settings"]["neftune"] = 5
    assert RunFingerprint.from_dict(fields).differences(fingerprint()) == [("neftune", "5", "not set")]


def test_an_identity_comes_back_as_it_was_written(tmp_path):
    identity = RunIdentity("id", fingerprint(targets="q_proj,v_proj"), {"torch": "2"})
    path = tmp_path / "fingerprint.json"
    path.write_text(json.dumps(identity.to_dict()))
    assert RunIdentity.read(path) == identity


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", "[" * 200_000, *ODD])
def test_a_damaged_one_is_one_sentence(tmp_path, content):
    path = tmp_path / "fingerprint.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunDirError, match=r"cannot be read.*--restart") as caught:
        RunIdentity.read(path)
    assert "\n" not in str(caught.value)


def test_an_identity_remembers_the_adapter_that_the_run_ended_in(tmp_path):
    identity = RunIdentity("id", fingerprint(), {}).ended_in({"adapter_model.safetensors": "e" * 64})
    path = tmp_path / "fingerprint.json"
    path.write_text(json.dumps(identity.to_dict()))
    assert RunIdentity.read(path).adapter == {"adapter_model.safetensors": "e" * 64}


def test_what_a_spike_does_is_held_since_it_decides_which_rows_are_learnt():
    assert fingerprint().differences(fingerprint(on_spike="rollback")) == [("on_spike", "record", "rollback")]
