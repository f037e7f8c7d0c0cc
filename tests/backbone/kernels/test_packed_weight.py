import bitsandbytes.functional as bnb
import pytest
import torch

from lorafit.backbone import (
    FrozenLinear4bit,
    dequantize,
    dequantize_linears,
    forget_quantization,
    load_backbone,
    quantize,
    true_numel,
)
from lorafit.config import resolve
from tiny_models import save_base, some_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (5, 10), (1, 64), (130, 66), (33, 2)])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_dequantise_is_bit_equal_to_bitsandbytes(shape, block, dtype, double):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    linear = quantize(weight, block=block, double=double)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type="nf4")
    assert torch.equal(linear.weight.data, packed)
    assert torch.equal(dequantize(linear), bnb.dequantize_4bit(packed, state))
    for other in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = other
        assert torch.equal(dequantize(linear, other), bnb.dequantize_4bit(packed, state))


def test_quantising_what_was_dequantised_gives_the_same_weight_again():
    linear = quantize(torch.randn(64, 64), double=False)
    dense = dequantize(linear)
    assert torch.equal(dequantize(quantize(dense, double=False)), dense)


def test_quantisation_does_not_depend_on_the_width_of_the_dtype():
    weight = torch.randn(96, 64).bfloat16()
    narrow, wide = quantize(weight), quantize(weight.float())
    assert torch.equal(narrow.weight.data, wide.weight.data)
    assert torch.equal(dequantize(narrow, torch.float32), dequantize(wide, torch.float32))


def test_the_error_of_nf4_is_small_and_the_zero_weight_is_exact():
    weight = torch.randn(256, 256)
    error = (dequantize(quantize(weight)) - weight).abs().mean()
    assert 0.01 < error < 0.09
    assert not dequantize(quantize(torch.zeros(64, 64), double=False)).any()


def test_the_given_weight_is_left_alone():
    weight = torch.randn(64, 64)
    before = weight.clone()
    quantize(weight)
    assert torch.equal(weight, before)


def test_4_bit_weights_are_counted_one_by_one():
    linear = quantize(torch.randn(33, 10), torch.zeros(33))
    assert true_numel(linear.weight) == 330
    assert true_numel(linear.bias) == 33


def test_a_dequantized_model_answers_as_the_frozen_one_and_saves_as_a_plain_one(tmp_path):
    model = load_backbone(resolve(flags={"base": str(save_base(tmp_path / "base"))}).config)
    frozen = model(some_ids()).logits
    dequantized = forget_quantization(dequantize_linears(model))
    assert torch.allclose(dequantized(some_ids()).logits, frozen, atol=1e-5)
    assert not any(isinstance(module, FrozenLinear4bit) for module in dequantized.modules())
    dequantized.save_pretrained(tmp_path / "plain")
    again = type(dequantized).from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(again(some_ids()).logits, dequantized(some_ids()).logits)
    assert not hasattr(again.config, "quantization_config")
