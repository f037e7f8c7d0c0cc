"""export: what a server gets is the run, whole, and proved."""

import json
import shutil

import pytest
import yaml

from lorafit.api.ship.export import export
from lorafit.errors import RunDirError, UsageError
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import Gguf
from lorafit.export.serving import GgufAdaptersFolder
from lorafit.export.serving.adapters_folder import vllm_settings
from lorafit.runs import RunDir


@pytest.fixture(scope="module")
def served(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "served"
    return export(tiny_run.run.path, to="adapter", out=folder, name="first")


def test_an_adapter_is_proved_over_the_base_beside_it(served):
    assert served.passed
    proof = served.verification["engines"][0]
    assert (proof["engine"], proof["status"]) == ("transformers with PEFT", "proved")
    assert proof["prompts"]["equal"] == proof["prompts"]["total"] > 3
    assert served.verification["merged"]["kl"] <= 10 * served.verification["floor"]["kl"]
    assert "| transformers with PEFT | proved |" in (served.proved_in / "README.md").read_text()


def test_a_second_run_shares_the_base_and_vllm_is_told_of_both(served, tiny_run):
    weights = served.folder / "base" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert export(tiny_run.run.path, to="adapter", out=served.folder, name="second").passed
    assert weights.stat().st_mtime_ns == before
    settings = yaml.safe_load((served.folder / "serving.yaml").read_text())
    assert settings["lora-modules"] == ["first=adapters/first", "second=adapters/second"]
    config = json.loads((served.proved_in / "adapter_config.json").read_text())
    assert (settings["model"], config["base_model_name_or_path"]) == ("base", "base")


def test_a_taken_name_and_a_run_over_another_base_are_refused(served, tiny_run):
    with pytest.raises(UsageError, match="has an adapter 'first' already"):
        export(tiny_run.run.path, to="adapter", out=served.folder, name="first")
    with pytest.raises(UsageError, match="'base' is no adapter's name"):
        export(tiny_run.run.path, to="adapter", out=served.folder, name="base")
    identity = served.folder / "base" / "base.json"
    held = identity.read_text()
    identity.write_text(json.dumps(json.loads(held) | {"fingerprint": "0" * 64}))
    with pytest.raises(UsageError, match="the base of this run is not the one"):
        export(tiny_run.run.path, to="adapter", out=served.folder, name="third")
    identity.write_text(held)
    assert not (served.folder / "adapters" / "third").exists()


def test_options_that_an_export_would_not_obey_are_refused(tiny_run):
    for options, reason in (
        ({"to": "merged", "quantization": "q8_0"}, "--to merged has no quantization"),
        ({"to": "adapter", "onto": "original"}, "--to adapter has no onto"),
        ({"to": "gguf", "name": "x"}, "--to gguf has no name"),
        ({"to": "gguf", "verify_in": "vllm"}, "vLLM proves no GGUF file"),
        ({"to": "gguf", "quantization": "iq4_xs"}, "no precision of a GGUF file"),
    ):
        with pytest.raises(UsageError, match=reason):
            export(tiny_run.run.path, **options)


def test_an_export_is_not_taken_for_a_folder_without_a_run(served, tiny_run):
    for path, said in (
        (served.folder, f"an export, not a run; lorafit serve {served.folder}"),
        (served.proved_in, f"an exported adapter, not a run; lorafit serve {served.folder}"),
        (served.proved_in / "adapter_config.json", "a file, and a run is a folder"),
        (tiny_run.run.adapter, f"a part of a run; pass {tiny_run.run.path}"),
        (served.folder.parent, "holds no run"),
    ):
        with pytest.raises(RunDirError) as caught:
            RunDir.open(path)
        assert said in str(caught.value)


def test_ranks_are_rounded_up_to_those_that_vllm_takes():
    assert vllm_settings({"a": 4, "b": 17}, "base")["max-lora-rank"] == 32
    with pytest.raises(UsageError, match="ranks up to 512"):
        vllm_settings({"a": 600}, "base")


def test_a_gguf_file_is_proved_in_llama_cpp_and_says_how_it_is_served(tiny_run, tmp_path):
    pytest.importorskip("xllamacpp")
    exported = export(tiny_run.run.path, to="gguf", quantization="F16", out=tmp_path / "file")
    proof = exported.verification["engines"][0]
    assert exported.passed and (proof["engine"], proof["status"]) == ("llama.cpp", "proved")
    assert proof["prompts"]["equal"] == proof["prompts"]["total"] > 3
    assert exported.serving["precision"] == "f16" and exported.serving["stop"] == ["</s>"]
    modelfile = (tmp_path / "file" / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-F16.gguf\nPARAMETER temperature 0\n")
    assert "{{ .Content }}</s>\n" in modelfile, "an answer within a prompt ends its line, as in training"


def test_an_adapter_is_proved_in_llama_cpp_over_one_file_of_their_base(tiny_run, tmp_path):
    pytest.importorskip("xllamacpp")
    folder = tmp_path / "served"
    first = export(tiny_run.run.path, to="gguf-lora", quantization="f16", out=folder, name="first")
    assert first.passed and first.verification["engines"][0]["status"] == "proved"
    assert first.verification["engines"][0]["prompts"]["total"] > 3
    assert (
        (first.proved_in / "Modelfile")
        .read_text()
        .startswith("FROM ../../base/model-F16.gguf\nADAPTER ./lora-F32.gguf\nPARAMETER temperature 0\n")
    )
    assert "../../base/model-F16.gguf" in (first.proved_in / "README.md").read_text()
    held = GgufAdaptersFolder(folder, Gguf("f16"))
    shutil.copytree(held.adapter("first"), held.adapter("second"))
    held.write_settings(FinishedRun.open(tiny_run.run.path))
    together = next(each["command"] for each in first.serving["commands"] if "without-apply" in each["command"])
    assert "0 is first, 1 is second" in together, "else llama.cpp adds all of them at once"
    with pytest.raises(UsageError, match="the file of the base of this run is not the one"):
        export(tiny_run.run.path, to="gguf-lora", quantization="q8_0", out=folder, name="third")
    with pytest.raises(UsageError, match="the file of the base of this run is not the one"):
        export(tiny_run.run.path, to="adapter", out=folder, name="third")


def test_a_k_quant_is_the_better_one_of_with_and_without_an_importance_matrix(tiny_run, tmp_path):
    pytest.importorskip("xllamacpp")
    found = export(tiny_run.run.path, to="gguf", quantization="q6_k", out=tmp_path / "file").verification
    both = found["importance"]
    assert both["rows"] > 0 and both["used"] is (both["with"]["kl"] < both["without"]["kl"])
    assert found["merged"]["kl"] == min(both["with"]["kl"], both["without"]["kl"])
    assert "importance matrix" in found["decision"]["reason"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "the other file is gone"
