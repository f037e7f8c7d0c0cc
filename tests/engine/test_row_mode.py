"""The start of a run finds out which rows may be packed, and the loss is the plain model's either way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone.skeleton_sizes import sizes_of
from lorafit.engine import collate, prove_rows
from lorafit.errors import BackboneError, TrainingError

LENGTHS = (24, 17, 12)


def rows_of(*lengths):
    random = np.random.default_rng(0)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= 3) for length in lengths]


def model_of(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family)).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.08)
    return model


def plain_loss(model, row):
    ids, mask = torch.from_numpy(row[0].astype(np.int64)), torch.from_numpy(row[1])
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama", ""),
        ("qwen3_5_text", "packed rows see each other"),
        ("granitemoehybrid", "packed rows see each other"),
        ("bloom", "does not take its attention from transformers' AttentionInterface"),
        ("stablelm", "does not pass its arguments on to attention"),
        ("gpt_oss", "attention sinks"),
    ],
)
def test_rows_are_packed_where_they_cannot_see_each_other_and_run_alone_elsewhere(family, reason):
    model, rows = model_of(family), rows_of(*LENGTHS)
    before = model.config._attn_implementation
    mode, loss = prove_rows(model, rows)
    assert mode.is_alone == bool(reason) and reason in mode.reason
    batches = [[row] for row in rows] if mode.is_alone else [rows]
    with mode.attending(model), torch.no_grad():
        ours = sum(loss.summed(model, collate(batch)) for batch in batches)
        assert model.config._attn_implementation == (before if mode.is_alone else "lorafit_packed")
    with torch.no_grad():
        torch.testing.assert_close(ours, sum(plain_loss(model, row) for row in rows), rtol=1e-5, atol=1e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_an_encoder_is_refused_though_a_causal_class_holds_it(family, tmp_path):
    with pytest.raises(TrainingError, match="tokens see later tokens"):
        prove_rows(model_of(family), rows_of(*LENGTHS))
    small_config(family).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is an encoder"):
        sizes_of(tmp_path)


def test_several_rows_never_run_through_a_model_that_takes_one():
    model, rows = model_of("bloom"), rows_of(*LENGTHS)
    _, loss = prove_rows(model, rows)
    with pytest.raises(AssertionError, match="several rows"):
        loss.summed(model, collate(rows))
