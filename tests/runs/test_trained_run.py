"""A finished run in which something was changed after training is found out by its hashes."""

import hashlib
import json

import pytest

from lorafit.config import resolve
from lorafit.errors import AdapterError, RunDirError
from lorafit.runs import (
    RunDir,
    RunFingerprint,
    RunIdentity,
    adapter_hashes,
    held_settings,
    require_trained_run,
)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (run.adapter / "adapter_config.json").write_bytes(b"{}")
    jinja = "{{ messages }}"
    run.write_json(run.template, {"jinja": jinja})
    run.samples.write_text('{"messages": []}\n')
    run.split.write_text("side\tsource\n")
    resolved = resolve(flags={"base": "some/base", "lr": 0.5})
    run.write_config(resolved.config, {key: source.value for key, source in resolved.sources.items()})
    template = hashlib.sha256(jinja.encode()).hexdigest()
    fingerprint = RunFingerprint("a", "b", template, "the base", held_settings(resolved.config))
    run.seal_files(RunIdentity("id", fingerprint).ended_in(adapter_hashes(run.adapter)))
    return run


def unsealed(run):
    """The run as the release before the seal left it."""
    saved = json.loads(run.identity.read_text())
    run.identity.write_text(json.dumps({key: saved[key] for key in ("run", "fingerprint", "environment", "adapter")}))
    return run


def test_the_adapter_as_it_was_saved_passes_with_a_file_beside_it(run):
    (run.adapter / "README.md").write_text("mine")
    require_trained_run(run)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"weightz", None])
def test_a_changed_or_missing_file_is_named_in_one_sentence(run, name, content):
    path = run.adapter / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(AdapterError, match=rf"has changed since training \({name} differs\)") as caught:
        require_trained_run(run)
    assert "\n" not in str(caught.value)


def test_a_run_that_kept_no_hashes_of_its_adapter_is_told_to_be_sealed(run):
    run.write_json(run.identity, RunIdentity("id", RunFingerprint("a", "b", "c", "d")).to_dict())
    with pytest.raises(AdapterError, match=r"no hashes of the adapter.*repeat the train command"):
        require_trained_run(run)


def test_a_run_without_its_fingerprint_is_refused(run):
    run.identity.unlink()
    with pytest.raises(RunDirError, match=r"fingerprint\.json: the run's fingerprint cannot be read"):
        require_trained_run(run)


def test_every_character_of_the_fingerprint_counts(run):
    """Each is replaced in turn: the file is refused, or says the same as before."""
    before, text = RunIdentity.read(run.identity), run.identity.read_text()
    for place in range(len(text)):
        for other in "0~":
            run.identity.write_text(text[:place] + other + text[place + 1 :])
            try:
                assert RunIdentity.read(run.identity) == before, text[place - 20 : place + 20]
            except RunDirError as error:
                assert "\n" not in str(error)


def test_no_key_of_an_older_releases_fingerprint_can_vanish_in_silence(run):
    text = unsealed(run).identity.read_text()
    assert not require_trained_run(run).is_sealed
    for key in ("run", "fingerprint", "environment", "adapter"):
        run.identity.write_text(text.replace(f'"{key}"', f'"{key[:-1]}_"', 1))
        with pytest.raises(RunDirError):
            require_trained_run(run)


@pytest.mark.parametrize("name", ["template.json", "held-out.jsonl", "split.tsv"])
def test_another_template_and_other_held_out_rows_are_refused(run, name):
    (run.path / name).write_text('{"jinja": "other"}\n')
    with pytest.raises(RunDirError, match=f"{name}: the file has changed since training; repeat the train command"):
        require_trained_run(run)


def test_another_template_is_refused_in_a_run_of_an_older_release_too(run):
    unsealed(run).template.write_text('{"jinja": "other"}')
    with pytest.raises(RunDirError, match=r"template\.json: the file has changed since training"):
        require_trained_run(run)


def test_an_edited_setting_is_named_with_both_values(run):
    run.settings.write_text(run.settings.read_text().replace("lr: 0.5", "lr: 0.25"))
    with pytest.raises(RunDirError, match=r"run\.yaml: the file says lr = 0\.25, .* with 0\.5; write lr back"):
        require_trained_run(run)


def test_hashes_that_cannot_be_read_are_not_taken_for_none(run):
    run.identity.write_text("{")
    with pytest.raises(RunDirError, match="cannot be read"):
        require_trained_run(run)


def test_without_base_json_the_base_is_known_by_the_fingerprint(run):
    assert run.base_fingerprint() == "the base"
    run.identity.unlink()
    assert run.base_fingerprint() is None
