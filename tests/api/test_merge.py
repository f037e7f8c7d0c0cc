"""merge: what is written is proved from disk."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fork_server import exit_code_of
from lorafit.api.load import load
from lorafit.api.merge import merge
from lorafit.demo import BASE
from lorafit.errors import RunDirError, UsageError, VerificationError
from lorafit.runs import RunDir

QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


@pytest.fixture(scope="module")
def merged(tiny_run, tmp_path_factory):
    return merge(tiny_run.run.path, onto="quantized", out=tmp_path_factory.mktemp("merged") / "model")


def test_the_quantised_merge_is_within_ten_noise_floors(merged):
    assert merged.passed
    result = merged.verification
    assert 0 < result.merged.kl <= 10 * result.floor.kl
    assert result.base.kl > 20 * result.merged.kl, "the base alone is far away, so the delta is really in"
    on_disk = json.loads((merged.folder / "verification.json").read_text())
    assert on_disk["passed"] is True


def test_transformers_alone_serves_the_merged_model_as_the_run_answers(tiny_run, merged):
    session = load(tiny_run.run.path)
    answer = session.answer(QUESTION, max_new_tokens=12)
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    model = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert ids["input_ids"][0].tolist() == session.template.prompt_ids(QUESTION)
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(made, skip_special_tokens=True).strip() == answer.strip()
    served = pipeline("text-generation", model=str(merged.folder), dtype=torch.float32)
    reply = served(QUESTION, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"]
    assert reply.strip() == answer.strip()


def test_a_merge_that_one_program_refutes_does_not_pass(merged):
    assert [proof.status for proof in merged.proofs] == ["proved", "not proved"]
    refuted = replace(merged, proofs=[replace(merged.proofs[0], status="failed"), merged.proofs[1]])
    assert merged.passed and not refuted.passed


def test_onto_the_original_reports_both_and_is_another_model(tiny_run, merged, tmp_path):
    other = merge(tiny_run.run.path, onto="original", out=tmp_path / "model")
    assert other.verification.onto == "original"
    assert other.verification.merged.kl > merged.verification.merged.kl


def test_only_a_base_that_there_is_can_be_merged_onto(tiny_run, tmp_path):
    with pytest.raises(UsageError, match="'orginal' is no base to merge onto; write quantized or original"):
        merge(tiny_run.run.path, onto="orginal", out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_taken_folder_is_refused(tiny_run, merged):
    with pytest.raises(RunDirError):
        merge(tiny_run.run.path, out=merged.folder)


def test_a_damaged_artefact_does_not_pass(tiny_run, merged, tmp_path):
    """The check can fail: the base's own weights in the merged folder's place are found out."""
    import shutil

    from lorafit.api.merge import template_of, verification_rows
    from lorafit.backbone import load_backbone
    from lorafit.export import format_named, verify
    from lorafit.methods import method_of

    wrong = tmp_path / "wrong"
    shutil.copytree(merged.folder, wrong)
    (wrong / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes())
    config = tiny_run.resolved.config
    method, form = method_of(config), format_named("safetensors")
    live = method.load(load_backbone(config), tiny_run.run.adapter, config)
    rows = verification_rows(tiny_run.run, template_of(tiny_run.run))
    assert not verify(live, wrong, rows, "quantized", method=method, export_format=form).passed


def test_damaged_rows_to_verify_on_are_one_sentence(tiny_run, tmp_path):
    from lorafit.api.merge import template_of, verification_rows

    for text in ('{"messages": [{"role"', '{"messages": []}\n', "[1]\n"):
        run = RunDir(tmp_path)
        run.samples.write_text(text)
        with pytest.raises(VerificationError, match=r"held-out.jsonl: the file is damaged; .*train command"):
            verification_rows(run, template_of(tiny_run.run))


@pytest.mark.slow
def test_a_merge_that_is_killed_before_it_is_verified_leaves_no_model_and_the_next_one_works(tiny_run, tmp_path):
    code = (
        "import os, signal, lorafit.api.ship.merge_proof as m\n"
        "import lorafit.api.merge as a\n"
        "m.verify = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"a.merge({str(tiny_run.run.path)!r}, out={str(tmp_path / 'model')!r})\n"
    )
    assert exit_code_of(code) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".model.staged"]
    again = merge(tiny_run.run.path, out=tmp_path / "model")
    assert again.passed
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (again.folder / "verification.json").is_file()
