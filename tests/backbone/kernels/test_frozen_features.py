import torch

from lorafit.backbone import frozen_features, quantise
from lorafit.backbone.kernels.frozen_linear_fp8 import fp8_row_scales, frozen_linear_fp8, quantised_rows
from lorafit.backbone.kernels.frozen_linear_op import frozen_linear, frozen_product, handle_for, op_arguments


def test_a_frozen_forward_is_known_by_its_widths_and_nothing_else_is():
    linear = quantise(torch.randn(96, 64))
    packed = op_arguments(linear.weight.data, linear.weight.quant_state)
    narrow = (*quantised_rows(torch.randn(2, 64)), fp8_row_scales(linear.weight.data, linear.weight.quant_state))
    assert frozen_features(frozen_linear, (torch.randn(2, 64), *packed, False)) == (64, 96)
    handle = (handle_for(linear, torch.device("cpu")), 96, 64)
    assert frozen_features(frozen_linear_fp8, (*narrow, *handle, False)) == (64, 96)
    assert frozen_features(frozen_product, (torch.randn(2, 64), *handle, False)) == (64, 96)
    assert frozen_features(frozen_product, (torch.randn(2, 96), *handle, True)) is None
    assert frozen_features(frozen_linear, (torch.randn(2, 96), *packed, True)) is None
    assert frozen_features(torch.ops.aten.mm.default, (torch.randn(2, 64), torch.randn(64, 96))) is None


def test_the_operators_are_those_that_a_trace_shows():
    assert frozen_linear is torch.ops.lorafit.frozen_linear.default
    assert frozen_product is torch.ops.lorafit.frozen_product.default
    assert frozen_linear_fp8 is torch.ops.lorafit.frozen_linear_fp8.default
