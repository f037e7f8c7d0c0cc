"""Packed attention against the textbook, and against transformers' own on real families."""

import math

import numpy as np
import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.engine import collate, require_isolated, supervised_logits, unpacked, use_packed_attention
from lorafit.engine.attention import grouped as grouped_module
from lorafit.engine.attention import packed as attention_op
from lorafit.engine.attention.grouped import ScoreOptions, grouped_attention, grouped_gradients
from lorafit.engine.attention.packed import packed_attention, packed_attention_op
from lorafit.engine.attention.sinks import sinks_gradient, with_sinks
from lorafit.engine.packing import Segments
from lorafit.errors import TrainingError
from tiny_models import FAMILIES, save_base

SINKS = torch.tensor([0.5, -2.0, 3.0, 0.0])
PACKABLE = [family for family in FAMILIES if family not in ("gpt_neox",)]


def textbook(query, key, value, lengths, scale, window=None, softcap=None, sinks=None):
    """Row by row, score by score, in float64."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (
        query.double()[0],
        key.double()[0].repeat_interleave(repeats, 0),
        value.double()[0].repeat_interleave(repeats, 0),
    )
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for i in range(length):
            first = max(0, i - window + 1) if window else 0
            keys = slice(start + first, start + i + 1)
            scores = (k[:, keys] @ q[:, start + i, :, None])[..., 0] * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            if sinks is not None:  # one more key, with a value of zero
                scores = torch.cat([scores, sinks.double()[:, None]], -1)
            out[:, start + i] = (scores.softmax(-1)[:, None, : i + 1 - first] @ v[:, keys])[:, 0]
        start += length
    return out.transpose(0, 1)[None]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_packed_attention_is_the_textbooks(window, softcap, kv_heads, sinks):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 9, 4]
    query = torch.randn(1, 4, sum(lengths), 8, generator=generator)
    key, value = (torch.randn(1, kv_heads, sum(lengths), 8, generator=generator) for _ in range(2))
    got, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None,
        scaling=0.3, sliding_window=window, softcap=softcap, segments=Segments.of_lengths(lengths), s_aux=sinks,
    )  # fmt: skip
    wanted = textbook(query, key, value, lengths, 0.3, window, softcap, sinks)
    assert torch.allclose(got.double(), wanted, atol=1e-5)


def rows_of(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= length // 2) for length in lengths]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = save_base(tmp_path_factory.mktemp(family), family)
        return str(made[family])

    return base


@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_row_has_the_logits_it_has_alone(bases, family):
    model = load_backbone(resolve(flags={"base": bases(family), "quantization": "none"}).config)
    use_packed_attention(model)
    rows = rows_of(20, 33, 7, 40)
    assert require_isolated(model, rows).relative_difference < 1e-3


def test_rows_that_see_each_other_are_refused(bases):
    model = load_backbone(resolve(flags={"base": bases("llama"), "quantization": "none"}).config)
    use_packed_attention(model)
    rows = rows_of(20, 33)
    leaky = collate(rows)

    class Leaky(torch.nn.Module):
        """Attends over the whole micro-batch as if it were one row."""

        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def set_attn_implementation(self, name):
            self.inner.set_attn_implementation(name)

        def forward(self, segments=None, **inputs):
            if segments is not None:
                inputs["segments"] = Segments.of_lengths([leaky.tokens])
            return self.inner(**inputs)

    with pytest.raises(TrainingError, match="see each other"):
        require_isolated(Leaky(model), rows)


def test_unpacked_is_undone_after_an_error(bases):
    model = load_backbone(resolve(flags={"base": bases("llama")}).config)
    use_packed_attention(model)
    with pytest.raises(RuntimeError), unpacked(model):
        assert model.config._attn_implementation == "sdpa"
        raise RuntimeError
    assert model.config._attn_implementation == "lorafit_packed"


def test_the_head_runs_at_supervised_positions_only(bases):
    model = load_backbone(resolve(flags={"base": bases("llama")}).config)
    use_packed_attention(model)
    batch = collate(rows_of(10, 14))
    assert supervised_logits(model, batch).shape == (batch.supervised, model.config.vocab_size)
    assert math.isfinite(float(supervised_logits(model, batch).sum()))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 4], [6, 6, 6]])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_the_written_out_gradient_is_autograds(window, softcap, lengths, has_sinks):
    segments = Segments.of_lengths(lengths)
    rows = (segments.gather, segments.scatter, segments.layout)
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, sum(lengths), 8), (1, 2, sum(lengths), 8), (1, 2, sum(lengths), 8))
    leaves = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    sinks = [SINKS.double().requires_grad_()] if has_sinks else []
    mixed = grouped_attention(*leaves, *rows, ScoreOptions(0.3, window, softcap, *sinks))
    grad = torch.randn(mixed.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(mixed, [*leaves, *sinks], grad)
    options = ScoreOptions(0.3, window, softcap, *(sink.detach() for sink in sinks))
    *got, of_sinks = grouped_gradients(grad, *(leaf.detach() for leaf in leaves), *rows, options)
    for piece, expected in zip([*got, of_sinks][: len(wanted)], wanted, strict=True):
        # scores and chances are in fp32 there, whatever the inputs are
        assert float((piece - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("rows", [1, 3])
def test_a_flash_kernel_that_knows_no_sinks_computes_them_forward_and_backward(rows):
    """The kernel for CPUs stands for those on a GPU: `rows` of one width, in each one's order of log-sums."""
    generator, width = torch.Generator().manual_seed(0), 12
    query, key, value = (torch.randn(rows, 4, width, 16, generator=generator) for _ in range(3))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=0.3)
    flat = out.transpose(1, 2).reshape(1, rows * width, 4, 16)
    flat, sums = with_sinks(flat, sums.reshape(4, rows * width), SINKS, rows)
    leaves = [part.transpose(1, 2).reshape(1, rows * width, 4, 16).transpose(1, 2) for part in (query, key, value)]
    leaves = [leaf.detach().requires_grad_() for leaf in (*leaves, SINKS)]
    segments = Segments.of_lengths([width] * rows)
    rows_of = (segments.gather, segments.scatter, segments.layout)
    wanted = grouped_attention(*leaves[:3], *rows_of, ScoreOptions(0.3, sinks=leaves[3]))
    torch.testing.assert_close(flat, wanted)
    grad = torch.randn(wanted.shape, generator=generator)
    *of_wanted, of_sinks = torch.autograd.grad(wanted, leaves, grad)
    g, o = (part.view(rows, width, 4, 16).transpose(1, 2) for part in (grad, flat))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g, query, key, value, o, sums.view(rows, 4, width), 0.0, True, scale=0.3
    )
    for piece, expected in zip(found, of_wanted, strict=True):
        torch.testing.assert_close(piece.transpose(1, 2).reshape(1, rows * width, 4, 16).transpose(1, 2), expected)
    torch.testing.assert_close(sinks_gradient(grad, flat, sums, SINKS, rows), of_sinks)


@pytest.mark.parametrize("scores", [1, 2 * 81, 4 * 81, 3 * 4 * 36, 1 << 26])
@pytest.mark.parametrize("lengths", [[5, 1, 9, 4], [6, 6, 6, 6, 6, 6, 6]])
def test_scores_are_written_out_in_pieces_and_come_to_the_same(scores, lengths, monkeypatch):
    segments = Segments.of_lengths(lengths)
    rows = (segments.gather, segments.scatter, segments.layout)
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 4, sum(lengths), 8), (1, 2, sum(lengths), 8), (1, 2, sum(lengths), 8))
    inputs = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    grad = torch.randn((1, sum(lengths), 4, 8), generator=generator, dtype=torch.float64)
    wanted = textbook(*inputs, lengths, 0.3, 5, 2.0)
    of_wanted = grouped_gradients(grad, *inputs, *rows, ScoreOptions(0.3, 5, 2.0))
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, **options: seen.append(x.shape) or softmax(x, **options))
    monkeypatch.setattr(grouped_module, "SCORES", scores)
    mixed = grouped_attention(*inputs, *rows, ScoreOptions(0.3, 5, 2.0))
    of_mixed = grouped_gradients(grad, *inputs, *rows, ScoreOptions(0.3, 5, 2.0))
    assert float((mixed - wanted).norm() / wanted.norm()) < 1e-6
    for piece, expected in zip(of_mixed[:3], of_wanted[:3], strict=True):
        assert float((piece - expected).norm() / expected.norm()) < 1e-6
    # no more at a time, but for one key head of one row
    assert all(math.prod(shape) <= scores or shape[:2] == (1, 2) for shape in seen)
    assert len(seen) == 2 * len(segments.groups) or scores < 1 << 26
    assert len(seen) > 2 * len(segments.groups) or scores > 2 * 81


def assert_laid_out_as_compiled_code_takes_them_to_be(device, lengths, dtype, sinks=None):
    """Outputs and gradients of the operator, of inputs that lie head by head, as its shapes for the compiler say."""
    segments = Segments.of_lengths(lengths).to(device)
    rows = (segments.cu_seqlens, segments.gather, segments.scatter, segments.layout, 0.125, None, None, sinks)
    tokens = sum(lengths)
    inputs = [torch.randn(1, heads, tokens, 64, device=device, dtype=dtype) for heads in (4, 2, 2)]
    grad = torch.randn(1, tokens, 4, 64, device=device, dtype=dtype)
    found = packed_attention_op(*inputs, *rows)
    told = attention_op._forward_shapes(*inputs, *rows)
    found_back = attention_op._backward(grad, *inputs, *found, *rows, sinks is not None)
    told_back = attention_op._backward_shapes(grad, *inputs, *told, *rows, sinks is not None)
    for piece, shape in zip((*found, *found_back), (*told, *told_back), strict=True):
        assert piece.shape == shape.shape
        wide = [axis for axis, size in enumerate(piece.shape) if size > 1]  # of the others no stride is ever used
        assert [piece.stride(axis) for axis in wide] == [shape.stride(axis) for axis in wide]


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_what_attention_returns_lies_as_compiled_code_takes_it_to(sinks):
    assert_laid_out_as_compiled_code_takes_them_to_be("cpu", [5, 3, 3], torch.float32, sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256] * 4, [100, 300, 7, 1]])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_on_a_gpu_too_with_every_kernel(lengths, sinks):
    sinks = sinks if sinks is None else sinks.to("cuda", torch.bfloat16)
    assert_laid_out_as_compiled_code_takes_them_to_be("cuda", lengths, torch.bfloat16, sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256] * 8, [100, 300, 7, 1], [512]])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_every_kernel_on_the_gpu_is_the_textbooks_forward_and_backward(lengths, window, has_sinks):
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((1, sum(lengths), 8, 64), (1, sum(lengths), 2, 64), (1, sum(lengths), 2, 64))
    leaves = [
        torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for size in sizes
    ]
    leaves += [SINKS.repeat(2).to("cuda", torch.bfloat16).requires_grad_()] if has_sinks else []
    segments = Segments.of_lengths(lengths).to("cuda")
    rows = (segments.gather, segments.scatter, segments.layout)
    got, _ = packed_attention_op(*leaves[:3], segments.cu_seqlens, *rows, 0.125, window, None, *leaves[3:])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = grouped_attention(*exact[:3], *rows, ScoreOptions(0.125, window, None, *exact[3:]))
    grad = torch.randn(got.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    pairs = zip(
        (got, *torch.autograd.grad(got, leaves, grad)),
        (wanted, *torch.autograd.grad(wanted, exact, grad.double())),
        strict=True,
    )
    for piece, expected in pairs:
        assert float((piece.double() - expected).norm() / expected.norm()) < 1e-2
