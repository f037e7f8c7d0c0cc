"""Products joined in compiled layers: the same gradient, by fewer products."""

from collections import Counter
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from engine.layers.test_families_compiled import adapted, gradient
from lorafit.backbone import keep_dense_together, siblings
from lorafit.config.dial import Dial
from lorafit.engine import DecoderLayers
from lorafit.engine.joined_products import JOINED_PRODUCTS, join_products

LENGTHS = (40, 21, 9)


class Joining:
    """A backend that joins products as inductor would, and runs the graph; it counts calls in `before` and `after`."""

    def __init__(self):
        self.before, self.after = [], []
        joined = partial(aot_autograd, decompositions=select_decomp_table())
        self.backend = joined(
            fw_compiler=self.compiled,
            bw_compiler=self.compiled,
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        )

    def compiled(self, module, inputs):
        self.before.append(calls(module.graph))
        join_products(module.graph)
        module.graph.lint()
        self.after.append(calls(module.graph))
        module.recompile()
        return make_boxed_func(module.forward)


def calls(graph):
    return Counter(node.target.__name__ for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload))


def difference(model, level="keep", autocast=False):
    """How far joined layers' gradient is from eager ones', and what was counted."""
    joining = Joining()
    layers = len(DecoderLayers(model, compiled=False))
    spec = "keep" if level == "keep" else f"{level}={layers}"
    wanted = gradient(model, LENGTHS, "cpu", autocast)
    with DecoderLayers(model, Dial.parse(spec, layers), backend=joining.backend) as driven:
        got = gradient(model, LENGTHS, "cpu", autocast)
    assert driven.compiled, driven.notes
    return float((got - wanted).norm() / wanted.norm()), joining


@pytest.mark.parametrize(
    ("family", "level"), [("llama", "feed_forward"), ("gemma2", "keep"), ("phi3", "keep"), ("qwen3_moe", "keep")]
)
def test_joined_products_have_the_gradient_of_layers_as_written(family, level, tmp_path):
    apart, joining = difference(adapted(family, tmp_path), level)
    assert apart < 1e-4
    joined = sum(count["frozen_products.default"] for count in joining.after)
    separate = sum(count["frozen_product.default"] for count in joining.after)
    before = sum(count["frozen_product.default"] for count in joining.before)
    if family == "phi3":  # whose projections of one input are one to begin with
        assert not joined and separate == before
    else:
        assert joined > 0 and separate + joined < before


def test_a_layer_of_seven_projections_makes_five_products_and_sends_four_back(tmp_path):
    apart, joining = difference(adapted("llama", tmp_path))
    assert apart < 1e-4
    forward, backward = joining.after
    assert forward["frozen_product.default"] + forward["frozen_products.default"] == 5
    assert backward["frozen_product.default"] + backward["frozen_products.default"] == 4
    # adapters: A of q, k, v and of gate, up in one each, B apart; back, B apart, A and its input's gradient in one each
    was_forward, was_backward = (count["mm.default"] for count in joining.before)
    assert forward["mm.default"] == was_forward - 2 - 1
    assert backward["mm.default"] == was_backward - 2 * (2 + 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "qv", "dropout": 0.0},
        {"targets": "attention", "alpha": 6.5},
        {"targets": "all-linear", "rank": 3},
    ],
    ids=str,
)
def test_so_they_have_with_any_adapter(settings, tmp_path):
    assert difference(adapted("llama", tmp_path, **settings))[0] < 1e-4


def test_dropout_draws_the_same_numbers_and_has_the_same_gradient(tmp_path):
    model = adapted("llama", tmp_path, dropout=0.3)
    layers = len(DecoderLayers(model, compiled=False))
    found = []
    for backend in ("aot_eager_decomp_partition", Joining().backend):
        torch._dynamo.reset()
        with DecoderLayers(model, Dial.parse("keep", layers), backend=backend):
            torch.manual_seed(3)
            found.append(gradient(model, LENGTHS, "cpu", autocast=False))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5


def test_in_bf16_joined_sums_are_no_farther_from_fp32_than_separate_ones(tmp_path):
    model = adapted("llama", tmp_path, compute="bf16")
    layers = len(DecoderLayers(model, compiled=False))
    exact = gradient(adapted("llama", tmp_path, compute="fp32"), LENGTHS, "cpu", autocast=False)
    far = []
    for backend in ("aot_eager_decomp_partition", Joining().backend):
        torch._dynamo.reset()
        with DecoderLayers(model, Dial.parse("keep", layers), backend=backend):
            found = gradient(model, LENGTHS, "cpu", autocast=True)
        far.append(float((found - exact).norm() / exact.norm()))
    assert far[1] < 1.1 * far[0]


def test_weights_kept_together_and_packed_ones_give_the_same_bits_and_kept_apart_the_same_gradient(tmp_path):
    model = adapted("llama", tmp_path)
    driven = DecoderLayers(model, Dial(), backend=Joining().backend)
    found = []
    linears = [linear for layer in driven.frozen for linear in layer]
    for keep in (lambda: None, lambda: together(driven), lambda: [linear.keep_dense() for linear in linears]):
        for linear in linears:
            linear.drop_dense()
        keep()
        model.to("cpu")  # the Trainer does so
        with driven:
            found.append(gradient(model, LENGTHS, "cpu", autocast=False))
    assert torch.equal(found[0], found[1])
    assert float((found[2] - found[0]).norm() / found[0].norm()) < 1e-5


def together(driven):
    for layer in driven.layers:
        for group in siblings(layer):
            keep_dense_together(group)


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)


def joined(function, *inputs):
    """The graph of `function` before and after the pass, and that both give the same."""
    graph = traced(function, *inputs)
    before, wanted = calls(graph.graph), graph(*inputs)
    join_products(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*inputs), wanted, rtol=1e-5, atol=1e-5)
    return before, calls(graph.graph)


X, A, B = torch.randn(7, 32), torch.randn(4, 32), torch.randn(5, 32)


def test_narrow_products_of_one_input_become_one_and_products_made_of_each_other_stay():
    before, after = joined(lambda x, a, b: (x @ a.t(), x @ b.t()), X, A, B)
    assert (before["mm.default"], after["mm.default"]) == (2, 1)

    def chained(x, a):
        first = x @ a.t()
        return first, x @ (first.t() @ x).t()

    before, after = joined(chained, X, A)
    assert before["mm.default"] == after["mm.default"] == 3


def test_a_scale_moves_to_the_narrower_side_and_not_to_the_wider():
    def scaled(x, a):
        return (x * 0.3) @ a.t()

    def widened(x, a):
        return (x[:, :3] * 0.3) @ a[:3]

    for function in (scaled, widened):
        joined(function, X, A)
    graph = traced(scaled, X, A).graph
    join_products(graph)
    (scale,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert scale.meta["val"].shape == (7, 4)
    graph = traced(widened, X, A).graph
    join_products(graph)
    (scale,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    assert scale.meta["val"].shape == (7, 3)


def test_a_product_that_reads_scaled_values_by_both_operands_stays_scaled_by_both():
    def gram(x):
        scaled = x * 0.3
        return scaled @ scaled.t()

    joined(gram, X)
    joined(lambda x, a: (x * 0.3) @ (a * 0.5).t(), X, A)
    joined(lambda x, a: (x * 0.3) @ (a * 0.3).t(), X, A)
    joined(lambda x: (x * 0.3) @ (x * 0.5).t(), X)


def test_in_fp16_a_product_is_not_made_of_what_was_to_be_scaled_down():
    def down(x, a):
        return (x * 0.3) @ a.t()

    def up(x, a):
        return (x * 2.0) @ a.t()

    for function, shape in ((down, (7, 32)), (up, (7, 4))):
        graph = traced(function, X.half(), A.half()).graph
        join_products(graph)
        (scaled,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        assert scaled.meta["val"].shape == shape


def test_narrow_products_of_other_shapes_are_added_as_they_are():
    def heads(x, a, p):
        return (x @ a.t()) @ a + (x.view(28, 8) @ p).view(7, 32) + (x.view(28, 8) @ p.t()).view(7, 32)

    before, after = joined(heads, X, A, torch.randn(8, 8))
    assert (before["mm.default"], after["mm.default"]) == (4, 3)


def test_a_graph_that_cannot_be_joined_is_compiled_as_it_was(monkeypatch, caplog):
    graph = traced(lambda x, a, b: (x @ a.t(), x @ b.t()), X, A, B).graph
    before = str(graph)

    def fails(edit):
        raise AssertionError("no such shape")

    monkeypatch.setattr("lorafit.engine.joined_products._join_sums", fails)
    JOINED_PRODUCTS(graph)
    assert str(graph) == before
    assert "products of a layer are not joined" in caplog.text


@pytest.mark.slow
def test_the_compiler_itself_makes_the_joined_gradient(tmp_path):
    model = adapted("llama", tmp_path)
    wanted = gradient(model, LENGTHS, "cpu", autocast=False)
    with DecoderLayers(model, Dial(), backend="inductor") as driven:
        got = gradient(model, LENGTHS, "cpu", autocast=False)
    assert driven.compiled, driven.notes
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
