"""The start of a run finds out which rows may share a micro-batch, and the loss is the plain model's either way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone.skeleton.sizes import sizes_of
from lorafit.engine import PACKED, VocabularyLoss, collate, prove_rows
from lorafit.engine.isolation import LeakError, require_isolated, uneven
from lorafit.engine.loss.logit_rules import LogitSteps
from lorafit.errors import BackboneError, TrainingError
from lorafit.shapes import ModelShape
from planning_shapes import LLAMA_8B

LENGTHS = (24, 17, 12)


def rows_of(*lengths):
    random = np.random.default_rng(0)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= 3) for length in lengths]


def model_of(family):
    torch.manual_seed(0)
    config = small_config(family) if isinstance(family, str) else family
    model = AutoModelForCausalLM.from_config(config).eval()
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
        ("gpt_oss", ""),
        ("mimo_v2_flash", ""),
    ],
)
def test_rows_are_packed_where_they_cannot_see_each_other_and_padded_elsewhere(family, reason):
    model, rows = model_of(family), rows_of(*LENGTHS)
    before = model.config._attn_implementation
    mode, loss = prove_rows(model, rows)
    assert mode.is_packed == (not reason) and mode.is_padded == bool(reason) and reason in mode.reason
    with mode.attending(model):
        assert model.config._attn_implementation == (before if reason else "lorafit_packed")
        ours, our_gradient = with_gradient(model, lambda: loss.summed(model, collate(rows, padded=mode.is_padded)))
    plain, gradient = with_gradient(model, lambda: sum(plain_loss(model, row) for row in rows))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    assert (our_gradient - gradient).norm() <= 1e-5 * gradient.norm()
    assert model.config._attn_implementation == before


def with_gradient(model, loss_of):
    model.zero_grad()
    loss = loss_of()
    loss.backward()
    return loss.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


class SharedNorm(torch.nn.Module):
    """Subtract the mean of all rows' first tokens."""

    def forward(self, hidden):
        return hidden - hidden[:, :1].mean(0)


class Backwards(torch.nn.Module):
    """Add a later token to each token, as no causal model does."""

    def forward(self, hidden):
        return hidden + torch.nn.functional.pad(hidden[:, 3:], (0, 0, 0, 3))


def test_rows_that_see_each_other_side_by_side_run_alone():
    model, rows = model_of("qwen3_5_text"), rows_of(*LENGTHS)
    model.model.norm = SharedNorm()
    mode, _ = prove_rows(model, rows)
    assert mode.is_alone and "padded rows see each other" in mode.in_words and "packed rows see" in mode.in_words


@pytest.mark.parametrize("lengths", [(20, 20, 20), (20,)])
def test_padding_is_tried_even_where_the_proof_has_rows_of_one_length(lengths):
    several = [len(ids) for ids, _ in uneven(rows_of(*lengths))]
    assert len(several) > 1 and len(set(several)) == len(several)
    model = model_of("qwen3_5_text")
    model.model.norm = Backwards()
    with pytest.raises(LeakError, match="padded rows see each other"):
        require_isolated(model, uneven(rows_of(*lengths)), padded=True)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0,
            "original_max_position_embeddings": 60}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
BY_LENGTH = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 60}, 60),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 60}, 60),
    "within chunks": ("llama4_text", {"attention_chunk_size": 60}, 60),
    "picks its keys": ("deepseek_v32", {"index_topk": 60}, 60),
}


@pytest.mark.parametrize("change", BY_LENGTH)
def test_rows_on_both_sides_of_a_length_at_which_the_model_changes_run_alone(change):
    """The proof sees a row's first tokens only, which are all on one side."""
    family, settings, tokens = BY_LENGTH[change]
    config = small_config(family)
    model = model_of(type(config)(**{**config.to_dict(), **settings}))
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
            weight.data *= 6  # sharp enough that a wrong position shows
    rows, long = rows_of(*LENGTHS), rows_of(70, 50, 40)
    short, _ = prove_rows(model, rows, tokens)
    assert not short.is_alone
    mode, loss = prove_rows(model, rows, 70)
    assert change in mode.reason and "above 60 tokens, and a row has 70" in mode.reason
    with torch.no_grad():
        plain = [plain_loss(model, row) for row in long]
        torch.testing.assert_close([loss.summed(model, collate([row])) for row in long], plain, rtol=1e-5, atol=1e-4)
    if short.is_packed:
        with PACKED.attending(model), torch.no_grad():
            assert abs(VocabularyLoss(LogitSteps()).summed(model, collate(long)) - sum(plain)) > 1e-3 * sum(plain)


def test_planning_knows_the_length_above_which_rows_run_alone():
    rope = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    shape = ModelShape.from_config({**LLAMA_8B, **rope}, "a-base")
    assert not shape.for_rows(4096).unpacked and not shape.for_rows(4096).is_padded
    above = shape.for_rows(5000)
    assert above.alone == "its rotary frequencies change (longrope) above 4,096 tokens, and a row has 5,000"
    assert above.unpacked and not above.is_padded


@pytest.mark.parametrize("family", ["bert", "electra", "megatron-bert"])
def test_an_encoder_is_refused_though_a_causal_class_holds_it(family, tmp_path):
    with pytest.raises(TrainingError, match="tokens see later tokens"):
        prove_rows(model_of(family), rows_of(*LENGTHS))
    small_config(family).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is an encoder"):
        sizes_of(tmp_path)


def test_rows_of_several_widths_never_run_without_packed_attention():
    model, rows = model_of("bloom"), rows_of(*LENGTHS)
    _, loss = prove_rows(model, rows)
    with pytest.raises(AssertionError, match="rows of one width"):
        loss.summed(model, collate(rows))
