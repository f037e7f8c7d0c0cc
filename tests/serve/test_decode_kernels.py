"""The Triton kernels of a decoding step."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lorafit.serve.decoding
from lorafit.serve.decoding import fused
from lorafit.serve.decoding.fused import one_rotation
from lorafit.serve.decoding.slot_cache import Places, SlotCache

KERNELS = Path(lorafit.serve.decoding.__file__).with_name("decode_kernels.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, for its interpreter")
def test_interpreted_the_kernels_rotate_and_write_as_the_family_does(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    specification = importlib.util.spec_from_file_location("interpreted_decode_kernels", KERNELS)
    kernels = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(kernels)
    generator = torch.Generator().manual_seed(0)
    query, key, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((3, 4, 1, 24), (3, 2, 1, 24), (3, 1, 24), (3, 1, 24))
    )
    for found, wanted in zip(
        kernels.rotate(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        assert torch.equal(found, wanted)
    keys, values, writes = torch.zeros(3, 2, 5, 24), torch.zeros(3, 2, 5, 24), torch.tensor([4, 0, 2])
    kernels.store(keys, values, key, key + 1, writes)
    for row, write in enumerate(writes):
        assert torch.equal(keys[row, :, write], key[row, :, 0])
        assert torch.equal(values[row, :, write], key[row, :, 0] + 1)
    assert keys.count_nonzero() == key.numel()


def test_the_kernels_take_rows_of_one_token_and_nothing_else(monkeypatch):
    kernels = SimpleNamespace(rotate=lambda *given: "by the kernel")
    monkeypatch.setattr(fused, "decode_kernels", kernels)
    query, key, angle = torch.randn(3, 4, 2, 8), torch.randn(3, 2, 2, 8), torch.randn(3, 2, 8)
    one = query[:, :, :1].contiguous(), key[:, :, :1].contiguous(), angle[:, :1].contiguous(), angle[:, :1].contiguous()
    plain = modeling_llama.apply_rotary_pos_emb
    with one_rotation([modeling_llama]):
        rotate = modeling_llama.apply_rotary_pos_emb
        assert rotate(*one) == "by the kernel"
        several = query, key, angle, angle
        strided = query[:, :, :1], key[:, :, :1], *one[2:]
        wide = torch.cat([one[0]] * 2, -1), torch.cat([one[1]] * 2, -1)
        for given in (several, strided, (*one, 1)):
            assert all(map(torch.equal, rotate(*given), plain(*given)))
        with pytest.raises(RuntimeError):  # a rotation of half a head is the family's own
            rotate(*wide, *one[2:])
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_rows_of_several_tokens_and_any_slots_are_written_without_the_kernel():
    layer = SlotCache([(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))], 3, 5)
    written = []
    for slots, tokens, by_kernel in ((range(3), 1, True), (range(3), 2, False), (torch.arange(3), 1, False)):
        places = Places(slots, torch.arange(tokens).expand(3, -1), 4, lambda *given: written.append(given))
        states = torch.randn(3, 2, tokens, 8)
        layer.at(places).layers[0].update(states, states + 1)
        assert len(written) == by_kernel
        written.clear()
        if not by_kernel:
            assert torch.equal(layer.layers[0].values[:, :, :tokens], states + 1)
