"""An adapter that was changed after training is found out by its hashes."""

import pytest

from lorafit.errors import AdapterError, RunDirError
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, adapter_hashes, require_trained_adapter


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (run.adapter / "adapter_config.json").write_bytes(b"{}")
    identity = RunIdentity("id", RunFingerprint("a", "b", "c", "the base")).ended_in(adapter_hashes(run.adapter))
    run.write_json(run.identity, identity.to_dict())
    return run


def test_the_adapter_as_it_was_saved_passes_with_a_file_beside_it(run):
    (run.adapter / "README.md").write_text("mine")
    require_trained_adapter(run)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"weightz", None])
def test_a_changed_or_missing_file_is_named_in_one_sentence(run, name, content):
    path = run.adapter / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(AdapterError, match=rf"has changed since training \({name} differs\)") as caught:
        require_trained_adapter(run)
    assert "\n" not in str(caught.value)


def test_a_run_that_kept_no_hashes_is_not_checked(run):
    run.write_json(run.identity, RunIdentity("id", RunFingerprint("a", "b", "c", "d")).to_dict())
    require_trained_adapter(run)
    run.identity.unlink()
    require_trained_adapter(run)


def test_hashes_that_cannot_be_read_are_not_taken_for_none(run):
    run.identity.write_text("{")
    with pytest.raises(RunDirError, match="cannot be read"):
        require_trained_adapter(run)


def test_without_base_json_the_base_is_known_by_the_fingerprint(run):
    assert run.base_fingerprint() == "the base"
    run.identity.unlink()
    assert run.base_fingerprint() is None
