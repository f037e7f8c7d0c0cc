"""A run with adapters on experts: trained, stopped, resumed to the same bits, merged, and loaded by plain PEFT."""

import signal

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorafit
from little_run import Send, write_rows
from lorafit.errors import TrainingStopped
from tiny_models import save_base

RESULTS = ("adapter/adapter_model.safetensors", "checkpoints/step-000003/optimizer.safetensors")


def test_adapters_on_experts_resume_to_the_same_bits_and_merge(tmp_path):
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.jsonl", 24)
    save_base(base, "qwen3_moe")
    settings = {"base": str(base), "targets": "all-linear+experts", "rank": 4, "dropout": 0.05, "lr": 0.02}
    settings |= {"max_steps": 3, "save_steps": 1, "holdout": 0.25, "examples_per_step": 4}
    run = lorafit.train(rows, out=tmp_path / "whole", **settings)
    with pytest.raises(TrainingStopped):
        lorafit.train(rows, out=tmp_path / "run", callbacks=[Send(signal.SIGTERM, 3)], **settings)
    lorafit.train(rows, out=tmp_path / "run", **settings)
    for name in RESULTS:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    adapter = load_file(tmp_path / "run" / RESULTS[0])
    assert run.counts.trainable == sum(part.numel() for part in adapter.values())
    assert any("experts" in name for name in adapter)

    merged = lorafit.merge(tmp_path / "run", onto="original", dtype="fp32")
    assert merged.passed, merged.verification.reason
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter").eval()
    ours, ids = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval(), torch.arange(4, 44)
    with torch.no_grad():
        got, wanted = ours(ids[None]).logits, tuned(ids[None]).logits
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
