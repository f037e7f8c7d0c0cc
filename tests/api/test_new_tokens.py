"""A run with new tokens: trained, resumed, merged, in plain PEFT, and refused where the rows cannot go."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from little_run import write_rows
from lorafit.api.check import check
from lorafit.api.merge import merge
from lorafit.api.pipeline import AdapterTrainingPipeline
from lorafit.api.ship.export import export
from lorafit.api.train import train
from lorafit.backbone import base_fingerprint
from lorafit.demo import BASE
from lorafit.errors import RunDirError, RunFinished, UsageError

TOKENS = ["<tool>", "</tool>"]
GIVEN = {"new_tokens": TOKENS, "max_steps": 4, "lr": 5e-3, "examples_per_step": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("new-tokens") / "tickets.jsonl", 8)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    field = next(key for key in rows[0] if key in ("response", "output", "answer"))
    path.write_text("".join(json.dumps({**row, field: f"<tool>{row[field]}</tool>"}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(data):
    return train(data, str(BASE), out=data.parent / "run", **GIVEN)


def test_check_counts_one_token_for_each_mark(data):
    plain, marked = check(data, str(BASE)), check(data, str(BASE), add_tokens="<tool>,</tool>", resize_vocab=True)
    assert marked.prepared.summary.tokens < plain.prepared.summary.tokens
    assert not any(finding.code in ("D048", "D050") for finding in marked.findings)


def test_its_merge_and_plain_peft_answer_alike(run):
    merged = merge(run.run.path, onto="original")
    assert merged.verification.passed
    tokenizer = AutoTokenizer.from_pretrained(run.run.adapter)
    ids = torch.tensor([tokenizer("Sort <tool>this</tool>").input_ids])
    assert {1024, 1025} < set(ids[0].tolist())
    assert AutoTokenizer.from_pretrained(merged.folder)("Sort <tool>this</tool>").input_ids == ids[0].tolist()
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    plain.resize_token_embeddings(len(tokenizer))  # as docs/guides/lora-variants.md says
    tuned = PeftModel.from_pretrained(plain, run.run.adapter).eval()
    whole = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ours, theirs = whole(ids).logits[..., : len(tokenizer)], tuned(ids).logits
    torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.02)  # the merge is in bf16
    rows = whole.get_input_embeddings().weight
    assert not torch.equal(rows[1024], rows[1025]) and torch.equal(rows[1026], rows[1027])


def test_the_same_command_finds_the_run_finished(run, data):
    with pytest.raises(RunFinished):
        train(data, str(BASE), out=run.run.path, **GIVEN)
    with pytest.raises(RunFinished):
        train(run.run.settings, out=run.run.path)
    with pytest.raises(RunDirError, match="new_tokens"):
        train(data, str(BASE), out=run.run.path, **{**GIVEN, "new_tokens": ["<tool>"]})


def test_programs_that_share_the_base_refuse_it(run):
    for target in ("adapter", "gguf-lora"):
        with pytest.raises(UsageError, match="trained rows of the embedding"):
            export(run.run.path, to=target)


def test_the_pipeline_takes_them_too():
    pipeline = AdapterTrainingPipeline(str(BASE), new_tokens=TOKENS)
    assert pipeline.tokenizer("<tool>").input_ids[-1] == 1024
    adapted = pipeline.inject_adapters(pipeline.load_frozen_backbone())
    assert adapted.get_base_model().get_input_embeddings().token_rows.shape[0] == 2


def test_a_lost_base_is_made_again_by_the_train_command(run, data):
    base = Path(run.resolved.config.base)
    base.rename(base.with_name("lost"))
    with pytest.raises(RunDirError, match=r"the base of this run no longer exists; .* repeat the train command"):
        merge(run.run.path, out=data.parent / "m")
    with pytest.raises(RunFinished):
        train(data, str(BASE), out=run.run.path, **GIVEN)
    assert base_fingerprint(base) == base_fingerprint(base.with_name("lost"))
