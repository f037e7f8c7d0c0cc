"""What compiled code holds of a frozen weight: a handle, never the weight."""

import copy
import gc

import pytest
import torch
from bitsandbytes.nn import Params4bit

from lorafit.backbone import freeze_linears, quantize
from lorafit.backbone.kernels.frozen_linear_op import frozen_product, handle_for, linear_of


def linear(seed=0, bias=None, rows=96, dtype=torch.float32):
    dense = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return quantize(dense, bias, dense_budget_bytes=0)


class Seen:
    """A backend that notes what each compiled graph was given, and runs it as it is."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        self.inputs = inputs
        return graph


def compiled(layer):
    torch._dynamo.reset()
    seen = Seen()
    return torch.compile(layer.forward, backend=seen, fullgraph=True), seen


def x_of(dtype=torch.float32):
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(9)).to(dtype).requires_grad_(True)


@pytest.mark.parametrize("bias", [None, torch.arange(96.0)], ids=["", "bias"])
def test_compiled_code_is_given_one_handle_a_weight_and_has_the_eager_output_and_gradient(bias):
    layer = linear(bias=bias)
    call, seen = compiled(layer)
    x, eager = x_of(), x_of()
    out, wanted = call(x), layer(eager)
    g = torch.randn_like(out)
    out.backward(g)
    wanted.backward(g)
    assert torch.equal(out, wanted) and torch.equal(x.grad, eager.grad)
    tensors = [value for value in seen.inputs if isinstance(value, torch.Tensor)]
    assert not any(isinstance(tensor, Params4bit) for tensor in tensors)
    assert sum(tensor.dtype == torch.int64 for tensor in tensors) == 1
    assert len(tensors) == 2 + (bias is not None)


def test_no_params4bit_reaches_the_op():
    layer = linear()
    for arguments in (layer.packed(), linear_of(layer._handle).packed()):
        assert all(type(value) is torch.Tensor for value in arguments if isinstance(value, torch.Tensor))
        assert isinstance(layer.weight, Params4bit)


def test_compiled_code_finds_a_copy_that_is_kept_and_does_without_one_that_is_not():
    layer = linear()
    call, seen = compiled(layer)
    first = x_of()
    wanted = call(first)
    wanted.sum().backward()
    for keep in (layer.keep_dense, layer.drop_dense):
        keep()
        x = x_of()
        out = call(x)
        out.sum().backward()
        assert torch.equal(out, wanted) and torch.equal(x.grad, first.grad)
    assert seen.graphs == 1
    # it is the copy that is multiplied by
    layer.keep_dense()
    layer.dense.zero_()
    assert not call(x_of()).any() and seen.graphs == 1


def test_another_weight_is_used_at_once_without_compiling_again():
    layer, other = linear(0), linear(1)
    call, seen = compiled(layer)
    call(x_of())
    layer.weight = other.weight
    assert torch.equal(call(x_of()), other(x_of()))
    layer.weight = linear(2).weight
    layer.weight.data = linear(3).weight.data  # in place
    layer.weight.quant_state.absmax = linear(3).weight.quant_state.absmax
    layer.weight.quant_state.state2 = linear(3).weight.quant_state.state2
    layer.weight.quant_state.offset = linear(3).weight.quant_state.offset
    assert torch.equal(call(x_of()), linear(3)(x_of()))
    assert seen.graphs == 1


def test_a_moved_layer_packs_its_weight_where_it_now_is():
    layer = linear()
    before = layer.packed()[0]
    layer._apply(torch.clone)
    assert layer.packed()[0].data_ptr() == layer.weight.data_ptr() != before.data_ptr()


def test_a_copy_goes_its_own_way():
    layer, other = linear(0), linear(1)
    twin = copy.deepcopy(layer)
    twin.weight = other.weight
    for call in (compiled(twin)[0], twin):
        assert torch.equal(call(x_of()), other(x_of()))
    assert torch.equal(compiled(layer)[0](x_of()), linear(0)(x_of()))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "compute_dtype", torch.bfloat16),
        lambda layer: setattr(layer, "weight_dtype", torch.bfloat16),
        lambda layer: layer.keep_dense(),
        lambda layer: freeze_linears(layer, torch.bfloat16, 0, fp8=True),
    ],
    ids=["compute_dtype", "weight_dtype", "keep_dense", "fp8"],
)
def test_compiled_code_follows_whatever_changes_how_a_layer_multiplies(change):
    layer = linear()
    call, _ = compiled(layer)
    before = call(x_of())
    change(layer)
    changed = call(x_of())
    assert torch.equal(changed, layer(x_of()))
    assert layer.dense is not None or not torch.equal(changed, before)
    layer.compute_dtype, layer.weight_dtype, layer.fp8 = torch.float32, None, False
    layer.drop_dense()
    assert torch.equal(call(x_of()), before)


def test_a_layer_whose_shape_fp8_does_not_take_compiles_whole_and_is_exact():
    layer = freeze_linears(linear(rows=90), torch.bfloat16, 0, fp8=True)
    assert layer.fp8 and layer.row_scales is None
    assert torch.equal(compiled(layer)[0](x_of()), layer(x_of()))


def test_a_handle_of_a_layer_that_is_gone_says_so():
    layer = linear()
    handle = layer._handle
    del layer
    gc.collect()
    with pytest.raises(AssertionError, match="gone"):
        linear_of(handle)


def test_handles_are_read_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert handle_for(linear(), torch.device("cpu")).device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_a_handle_lies_there_and_is_known_without_being_read():
    layer = linear(dtype=torch.bfloat16).cuda()
    assert layer._handle.is_cuda and linear_of(layer._handle) is layer
    assert linear_of(layer._handle.clone()) is layer  # a copy is read
    call, _ = compiled(layer)
    graph, x = torch.cuda.CUDAGraph(), torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    wanted = call(x)
    with torch.cuda.graph(graph):  # which nothing may be waited for in
        out = call(x)
    graph.replay()
    assert torch.equal(out, wanted)
    assert not layer.cpu()._handle.is_cuda


def test_the_product_passes_pytorchs_own_checks():
    layer = linear()
    for width, transposed in ((64, False), (96, True)):
        arguments = (torch.randn(5, width), layer._handle, 96, 64, transposed)
        torch.library.opcheck(frozen_product, arguments)
