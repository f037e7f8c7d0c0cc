"""Where packed rows begin and end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V

from lorafit.engine.attention.packed import packed_attention_op
from lorafit.engine.packing import MAX_PADDED, Segments, on_host


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30))
def test_every_token_is_in_exactly_one_place_of_its_own_row(lengths):
    segments = Segments.of_lengths(lengths)
    flat = torch.cat([group.tokens.flatten() for group in segments.groups])
    assert flat[segments.scatter].tolist() == list(range(sum(lengths)))
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for group in segments.groups:
        rows = row_of[group.tokens]
        assert (rows == rows[:, :1]).all(), "a group's row mixes two rows"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40))
def test_padding_stays_within_its_bound(lengths):
    segments = Segments.of_lengths(lengths)
    assert sum(group.tokens.numel() for group in segments.groups) <= MAX_PADDED * sum(lengths)


def test_boundaries_are_cumulative_lengths():
    segments = Segments.of_lengths([3, 1, 2])
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.longest == 3


@pytest.mark.gpu
def test_on_a_gpu_the_layout_is_known_by_what_stands_for_it():
    segments = Segments.of_lengths([30, 29, 3])
    there = segments.to("cuda")
    assert there.layout.is_cuda, "an operator given a tensor of the CPU has its output taken for unaligned"
    assert on_host(there.layout).tolist() == segments.layout.tolist() == [2, 30, 1, 3]
    assert there.longest == 30 and len(there.groups) == 2
    assert there.to("cuda").layout.is_cuda and there.to("cpu").layout.tolist() == [2, 30, 1, 3]
    del there
    others = [Segments.of_lengths([length]).to("cuda") for length in range(1, 50)]  # some where `there` lay
    assert [other.longest for other in others] == list(range(1, 50))


@pytest.mark.gpu
def test_compiled_attention_on_a_gpu_has_its_output_taken_for_aligned(monkeypatch):
    found = []

    def note(graph):
        found.append(set(V.graph.unaligned_buffers))

    def attend(q, k, v, segments):
        rows = (segments.gather, segments.scatter, segments.layout)
        return packed_attention_op(q, k, v, segments.cu_seqlens, *rows, 0.125, None, None)[0] * 2

    torch._dynamo.reset()
    query = torch.randn(1, 4, 96, 64, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(Scheduler, "codegen", lambda self, run=Scheduler.codegen: (note(self), run(self))[1])
    out = torch.compile(attend, fullgraph=True)(query, query, query, Segments.of_lengths([64, 32]).to("cuda"))
    assert torch.isfinite(out).all()
    assert found == [set()]
