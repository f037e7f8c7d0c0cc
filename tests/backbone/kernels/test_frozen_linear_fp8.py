import copy

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from lorafit.backbone import FrozenLinear4bit, computing_in, dequantize, freeze_linears, frozen_features, quantize
from lorafit.backbone.kernels.frozen_linear_fp8 import fp8_row_scales, frozen_linear_fp8, quantized_rows
from lorafit.backbone.kernels.frozen_linear_op import frozen_linear, frozen_product, handle_for, op_arguments

BOUND = 0.05
"""Stated: by so much at most the output and the gradient may differ from the exact op's, in norm."""


def linear(rows=96, columns=128, seed=0, device="cpu", fp8=True, bias=None, **options):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    made = quantize(weight.to(device, torch.bfloat16), bias, **options)
    freeze_linears(made, torch.bfloat16, 0, fp8=fp8)
    return made


def normal(*shape, seed=1, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def difference(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def output_and_gradient(layer, x, g):
    x = x.clone().requires_grad_(True)
    out = layer(x)
    out.backward(g)
    return out.detach(), x.grad


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("block", "columns"), [(64, 128), (128, 256), (32, 96)])
def test_output_and_gradient_differ_from_the_exact_ones_by_less_than_the_stated_bound(block, columns, double):
    layer = linear(columns=columns, block=block, double=double)
    assert layer.row_scales is not None
    x, g = normal(2, 5, columns), normal(2, 5, 96, seed=2)
    out, gradient = output_and_gradient(layer, x, g)
    exact = dequantize(layer, torch.float32)
    assert out.dtype == gradient.dtype == torch.bfloat16
    assert 0.01 < difference(out, x.float() @ exact.T) < BOUND  # above zero: it really was in FP8
    assert 0.01 < difference(gradient, g.float() @ exact) < BOUND


def test_forward_and_backward_multiply_by_the_same_e4m3_values():
    layer = linear()
    scales, weight = layer.row_scales, (layer._handle, 96, 128)
    straight = frozen_linear_fp8(*exactly(torch.eye(128)), scales, *weight, False)
    across = frozen_linear_fp8(*exactly(torch.eye(96)), scales, *weight, True)
    assert torch.equal(straight.t(), (across.float() * scales[0][:, None]).bfloat16())
    # and they are e4m3: nothing is lost in the cast
    assert torch.equal(across.to(torch.float8_e4m3fn).bfloat16(), across)
    assert across.abs().amax(1).eq(448).all()  # the whole range is used, in every row


def exactly(x):
    return x.to(torch.float8_e4m3fn), torch.ones(len(x), 1)


def test_only_a_handle_and_the_rows_scales_are_kept_for_backward():
    layer = linear(256, 256)
    x, saved = normal(4, 256).requires_grad_(True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved} == {layer.row_scales.data_ptr(), layer._handle.data_ptr()}


def test_copies_in_e4m3_are_what_is_made_on_each_call_and_are_the_weights_own():
    layer, x, g = linear(), normal(7, 128), normal(7, 96, seed=2)
    wanted = output_and_gradient(layer, x, g)
    layer.keep_dense()
    assert [tuple(copy.shape) for copy in layer.copies] == [(96, 128), (128, 96)] and layer.dense is None
    assert sum(copy.numel() * copy.element_size() for copy in layer.copies) == layer.dense_bytes()
    for kept, found in zip(wanted, output_and_gradient(layer, x, g), strict=True):
        assert torch.equal(kept, found)
    for kept in layer.copies:
        kept.zero_()
    assert not any(part.any() for part in output_and_gradient(layer, x, g))
    layer.weight = linear(seed=1).weight  # another weight: neither its scales nor its copies are these
    assert not layer.copies
    layer.drop_dense()
    assert layer._kept is None


def test_a_gradient_as_small_as_training_makes_them_loses_nothing():
    layer, x, g = linear(), normal(3, 128), normal(3, 96, seed=2)
    _, gradient = output_and_gradient(layer, x, g)
    _, small = output_and_gradient(layer, x, g * 2.0**-60)
    assert torch.equal(small, gradient * 2.0**-60)


def test_rows_are_scaled_apart_and_zeros_and_nans_stay_where_they_are():
    layer, x = linear(), normal(4, 128)
    alone = layer(x[:1])
    x[1], x[2], x[3] = 0, x[2] * 1000, float("nan")
    out = layer(x)
    assert torch.equal(out[:1], alone)
    assert not out[1].any()
    assert out[2].isfinite().all()
    assert out[3].isnan().all()


def test_quantised_rows_use_the_whole_range_and_give_nearly_the_values_back():
    x = normal(5, 64) * torch.tensor([1e-9, 1e-3, 1, 1e3, 1e9])[:, None]
    narrow, scale = quantized_rows(x)
    assert narrow.float().abs().amax(1).eq(448).all()
    # half of the last place of three bits, and of the smallest number there is
    error = (narrow.float() * scale - x.float()).abs()
    assert (error <= 2.0**-4 * x.float().abs() * 1.001 + 2.0**-10 * scale).all()


@pytest.mark.parametrize(("rows", "columns"), [(90, 128), (96, 120), (96, 72)])
def test_a_shape_that_fp8_does_not_take_is_multiplied_exactly(rows, columns):
    layer, plain = linear(rows, columns), linear(rows, columns, fp8=False)
    x = normal(3, columns)
    assert layer.row_scales is None
    assert torch.equal(layer(x), plain(x))


def test_a_new_weight_is_not_multiplied_with_the_old_ones_scales():
    layer, other = linear(seed=0), linear(seed=1, fp8=False)
    layer.weight = other.weight  # as PEFT's merge does
    x = normal(3, 128)
    assert torch.equal(layer(x), other(x))


def test_moving_and_copying_the_layer_keeps_it_in_fp8():
    layer, x = linear(), normal(3, 128)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    assert twin.row_scales is not None and twin.row_scales.data_ptr() != layer.row_scales.data_ptr()
    layer.to("cpu")
    assert torch.equal(layer(x), expected)
    assert {name for name, _ in layer.named_parameters()} == {"weight"}
    assert not any("scale" in key for key in layer.state_dict())


def test_the_bias_is_added_and_an_empty_input_gives_an_empty_output():
    layer = linear(bias=torch.ones(96))
    assert torch.equal(layer(torch.zeros(1, 128).bfloat16()), torch.ones(1, 96).bfloat16())
    assert layer(torch.empty(0, 128).bfloat16()).shape == (0, 96)


def test_the_input_dtype_comes_back():
    assert linear()(normal(3, 128).float()).dtype == torch.float32


def test_computing_in_another_precision_is_never_in_fp8():
    model = torch.nn.Sequential(linear())
    x = normal(3, 128)
    expected = x.float() @ dequantize(model[0], torch.float32).T
    before = model(x)
    with computing_in(model, torch.float32):
        torch.testing.assert_close(model(x.float()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), before)


def test_freezing_again_without_fp8_is_exact_again():
    layer, x = linear(), normal(3, 128)
    freeze_linears(layer, torch.bfloat16, 0)
    assert torch.equal(layer(x), linear(fp8=False)(x))


def test_the_op_passes_pytorchs_own_checks():
    layer = linear()
    weight = (layer._handle, 96, 128)
    # no test_schema: torch cannot compare e4m3 tensors on a CPU
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for width, transposed in ((128, False), (96, True)):
        arguments = (*quantized_rows(normal(2, 3, width)), layer.row_scales, *weight, transposed)
        torch.library.opcheck(frozen_linear_fp8, arguments, test_utils=checks)


class FeedForward(torch.nn.Module):
    def __init__(self, seed=0, device="cpu"):
        super().__init__()
        self.gate, self.up = linear(seed=seed, device=device), linear(seed=seed + 1, device=device)
        self.down = linear(128, 96, seed=seed + 2, device=device, block=32)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def narrowings(graph):
    return sum(node.kwargs.get("dtype") is torch.float8_e4m3fn for node in graph.graph.nodes)


def test_it_compiles_whole_once_for_all_layers_and_lengths_and_quantises_a_shared_input_once():
    graphs = {"forward": [], "backward": []}

    def keep(name):
        return lambda graph, _: graphs[name].append(graph) or make_boxed_func(graph)

    torch._dynamo.reset()
    # the partitioner that inductor uses: it merges equal expressions
    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition)
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=True, backend=backend)
    for seed, tokens in enumerate([5, 9, 33]):
        layer = FeedForward(seed)
        x, g = normal(1, tokens, 128, seed=seed), normal(1, tokens, 128, seed=9)
        found = output_and_gradient(lambda x, layer=layer: compiled(layer, x), x, g)
        expected = output_and_gradient(layer, x, g)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert len(graphs["forward"]) == len(graphs["backward"]) == 1
    assert narrowings(graphs["forward"][0]) == 2  # the input of gate and up, and the input of down
    assert narrowings(graphs["backward"][0]) == 3


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (1024, 512), (4096, 1024)])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_on_a_gpu_output_and_gradient_are_those_of_the_cpus_arithmetic(rows, columns, tokens):
    layer, x, g = linear(rows, columns, device="cuda"), normal(tokens, columns), normal(tokens, rows, seed=2)
    found = output_and_gradient(layer, x.cuda(), g.cuda())
    reference = FrozenLinear4bit.to(copy.deepcopy(layer), "cpu")
    for on_gpu, on_cpu in zip(found, output_and_gradient(reference, x, g)):
        # the same rounded numbers, summed in the 14 bits or so that fast accumulation has
        assert difference(on_gpu.cpu(), on_cpu) < 0.02
    exact = dequantize(layer, torch.float32).cpu()
    assert difference(found[0].cpu(), x.float() @ exact.T) < BOUND
    assert difference(found[1].cpu(), g.float() @ exact) < BOUND


@pytest.mark.gpu
@needs_fp8
def test_on_a_gpu_it_compiles_whole_for_any_length():
    torch._dynamo.reset()
    layer = FeedForward(device="cuda")
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, dynamic=True)
    for tokens in (5, 64, 333):
        x, g = normal(1, tokens, 128, device="cuda"), normal(1, tokens, 128, seed=9, device="cuda")
        for a, b in zip(output_and_gradient(compiled, x, g), output_and_gradient(layer, x, g)):
            assert difference(a, b) < BOUND  # fused neighbours round less often, and e4m3 rounds coarsely


def test_a_frozen_forward_is_known_by_its_widths_and_nothing_else_is():
    linear = quantize(torch.randn(96, 64))
    packed = op_arguments(linear.weight.data, linear.weight.quant_state)
    narrow = (*quantized_rows(torch.randn(2, 64)), fp8_row_scales(linear.weight.data, linear.weight.quant_state))
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
