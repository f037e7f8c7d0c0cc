import contextlib
import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit

from lorafit.backbone import FrozenLinear4bit, dequantize, freeze_linears, quantize
from lorafit.backbone.kernels.frozen_linear_op import few_rows, frozen_linear, op_arguments

ALL, NONE = 1 << 30, 0


def weight(rows=96, columns=64, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("budget", [ALL, NONE], ids=["dense", "packed"])
@pytest.mark.parametrize("bias", [None, torch.arange(96.0)], ids=["", "bias"])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(budget, bias):
    linear = quantize(weight(), bias, dense_budget_bytes=budget)
    assert (linear.dense is not None) == (budget == ALL)
    x = torch.randn(2, 5, 64, requires_grad=True)
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    x_ref = x.detach().clone().requires_grad_(True)
    expected = F.linear(x_ref, dense, bias)
    out = linear(x)
    g = torch.randn_like(out)
    out.backward(g)
    expected.backward(g)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=0, atol=1e-5)
    assert linear.weight.grad is None


@pytest.mark.parametrize("budget", [ALL, NONE], ids=["dense", "packed"])
def test_only_the_weight_is_kept_for_backward(budget):
    linear = quantize(weight(), dense_budget_bytes=budget)
    saved = []
    x = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    own = [linear.dense] if budget else [linear.weight.data, linear.weight.quant_state.absmax]
    storages = {t.untyped_storage().data_ptr() for t in own}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in storages]
    # beyond the packed weight, only the second quantisation's tables (a few hundred numbers): neither x nor dequant(W)
    assert sum(t.numel() for t in new) < 300
    assert all(t.data_ptr() != x.data_ptr() for t in saved)


@pytest.mark.parametrize("budget", [ALL, NONE], ids=["dense", "packed"])
def test_the_packed_bytes_survive_training_and_evaluation_where_bitsandbytes_would_repack(monkeypatch, budget):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    linear = quantize(weight(), dense_budget_bytes=budget)
    upstream = Linear4bit(64, 96, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    upstream.weight = copy.deepcopy(linear.weight)
    upstream.support_avx512bf16_for_cpu = linear.support_avx512bf16_for_cpu = True
    before = linear.weight.data.clone()
    x = torch.randn(3, 64)
    for mode in (True, False, True, False):
        linear.train(mode)
        out = linear(x)
        with torch.inference_mode():
            linear(x)
    assert torch.equal(linear.weight.data, before)
    assert linear.weight.quant_state.nested and not getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    # the trap is real: the layer that lorafit replaces does repack here
    upstream.eval()
    # a machine without AVX512-BF16 lacks the kernel for the repacked layout; the weight is repacked all the same
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        upstream(x)
    assert not torch.equal(upstream.weight.data.reshape(-1), before.reshape(-1))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_the_kernel_for_few_rows_is_fed_the_same_weight(double):
    linear = quantize(weight(), double=double)
    x = torch.randn(2, 3, 64)
    *state, out_features, _, block, quant_type = op_arguments(linear.weight.data, linear.weight.quant_state)
    found = few_rows(x, *state, out_features, block, quant_type)
    torch.testing.assert_close(found, x @ dequantize(linear).T, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 17, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_output_and_gradient_are_those_of_the_dequantised_weight(dtype, rows):
    linear = quantize(weight(256, 128).cuda().to(dtype), torch.randn(256).cuda().to(dtype))
    packed = linear.weight.data.clone()
    dense = dequantize(linear)
    assert torch.equal(dense, bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state))
    x = torch.randn(rows, 128, device="cuda", dtype=dtype, requires_grad=True)
    x_ref = x.detach().clone().requires_grad_(True)
    out, expected = linear(x), F.linear(x_ref, dense, linear.bias)
    g = torch.randn_like(out)
    out.backward(g)
    expected.backward(g)
    # up to 16 rows bitsandbytes' fused kernel sums in another order: compare norms, not elements
    tolerance = 1e-3 if dtype == torch.float32 else 1e-2
    for got, wanted in ((out, expected), (x.grad, x_ref.grad)):
        assert float((got - wanted).float().norm() / wanted.float().norm()) < tolerance
    assert torch.equal(linear.weight.data, packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_only_the_packed_weight_is_kept_for_backward():
    linear = quantize(torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    out = linear(x)
    assert torch.cuda.memory_allocated() - before <= 2 * out.nbytes


def test_the_op_passes_pytorchs_own_checks():
    for double in (True, False):
        linear = quantize(weight(), double=double)
        arguments = op_arguments(linear.weight.data, linear.weight.quant_state)
        x = torch.randn(3, 64, requires_grad=True)
        torch.library.opcheck(frozen_linear, (x, *arguments, False))
        y = torch.randn(2, 3, 96, requires_grad=True)
        torch.library.opcheck(frozen_linear, (y, *arguments, True))


def test_the_second_derivative_is_right():
    linear = quantize(weight(8, 64).double().float())
    x = torch.randn(2, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    torch.testing.assert_close(second, (2 * dense.T @ dense).sum(0).expand(2, 64), rtol=1e-4, atol=1e-3)


def test_it_compiles_whole_and_once_for_layers_of_the_same_shape():
    layers = [quantize(weight(64, 64, seed), dense_budget_bytes=NONE) for seed in range(4)]
    frames = []

    def count(graph, _):
        frames.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=count)
    x = torch.randn(5, 64)
    for layer in layers:
        assert torch.equal(compiled(layer, x), layer(x))
    assert len(frames) == 1


def test_the_input_dtype_comes_back_and_the_sums_are_in_the_compute_dtype():
    linear = quantize(weight(), compute_dtype=torch.float32)
    x = torch.randn(3, 64).bfloat16()
    out = linear(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x.float()).bfloat16())


def test_freezing_swaps_the_class_and_stays_a_linear4bit():
    upstream = Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.float32)
    upstream.to("cpu")
    model = torch.nn.Sequential(upstream, torch.nn.Linear(96, 3))
    freeze_linears(model)
    assert type(upstream) is FrozenLinear4bit and isinstance(upstream, Linear4bit)
    assert type(model[1]) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in upstream.parameters())
    assert freeze_linears(model) is model  # a second time changes nothing


def test_dense_copies_are_kept_as_long_as_the_budget_lasts():
    model = torch.nn.Sequential(*(quantize(weight(64, 64, seed)) for seed in range(4)))
    freeze_linears(model, dense_budget_bytes=2 * 64 * 64 * 4)
    assert [linear.dense is not None for linear in model] == [True, True, False, False]
    freeze_linears(model, dense_budget_bytes=0)
    assert all(linear.dense is None for linear in model)


def test_a_new_weight_makes_the_dense_copy_stale_and_it_is_not_used():
    linear = quantize(weight(seed=0), dense_budget_bytes=ALL)
    other = quantize(weight(seed=1))
    x = torch.randn(3, 64)
    linear.weight = other.weight  # as PEFT's merge does
    assert linear.dense is None
    assert torch.equal(linear(x), other(x))


def test_moving_the_layer_makes_a_fresh_dense_copy_of_what_was_moved():
    linear = quantize(weight(), dense_budget_bytes=ALL)
    x = torch.randn(3, 64)
    expected, before = linear(x), linear.dense
    linear.to("cpu")
    assert linear.dense is before  # for nothing was moved
    linear._apply(torch.clone)
    assert linear.dense is not None and linear.dense is not before
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-5)


def test_copies_and_state_dicts_hold_no_dense_weight():
    linear = quantize(weight(), dense_budget_bytes=ALL)
    assert not any("dense" in key or "_kept" in key for key in linear.state_dict())
    assert {name for name, _ in linear.named_parameters()} == {"weight"}
    twin = copy.deepcopy(linear)
    x = torch.randn(3, 64)
    assert torch.equal(twin(x), linear(x))
    assert twin.dense is not None and twin.dense.data_ptr() != linear.dense.data_ptr()


def test_an_empty_input_gives_an_empty_output():
    for budget in (ALL, NONE):
        assert quantize(weight(), dense_budget_bytes=budget)(torch.empty(0, 64)).shape == (0, 96)


def test_moving_to_where_it_is_keeps_the_dense_copy(tmp_path):
    """The Trainer calls `.to(device)` before training: losing the copies there made CPU training four times slower."""
    from lorafit.backbone import load_backbone
    from lorafit.config import resolve
    from tiny_models import save_base

    model = load_backbone(resolve(flags={"base": str(save_base(tmp_path / "base"))}).config)
    model.to("cpu")
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    assert frozen
    assert all(module.dense is not None for module in frozen)
