"""Several frozen linears as one product."""

import pytest
import torch

from backbone.kernels.test_weight_handle import linear
from lorafit.backbone import frozen_products, keep_dense_together, siblings
from lorafit.backbone.kernels.frozen_products import _adjoin, _runs

WIDTHS = [96, 32, 160]


@pytest.fixture
def linears():
    return [linear(seed, rows=rows) for seed, rows in enumerate(WIDTHS)]


def handles(linears):
    return [module._handle for module in linears]


@pytest.mark.parametrize("keep", ["none", "together", "apart", "some"])
def test_the_product_is_that_of_each_and_back_it_is_their_sum(linears, keep):
    if keep == "together":
        keep_dense_together(linears)
    elif keep != "none":
        for module in linears[: None if keep == "apart" else 1]:
            module.keep_dense()
    x = torch.randn(2, 5, 64)
    joined = frozen_products(x, handles(linears), WIDTHS, 64, False)
    apart = torch.cat([module(x) for module in linears], -1)
    torch.testing.assert_close(joined, apart, rtol=1e-5, atol=1e-4)
    g = torch.randn(2, 5, sum(WIDTHS))
    back = frozen_products(g, handles(linears), WIDTHS, 64, True)
    wanted = sum(part @ module.unpacked() for part, module in zip(g.split(WIDTHS, -1), linears))
    torch.testing.assert_close(back, wanted, rtol=1e-5, atol=1e-4)


def test_copies_made_together_adjoin_and_are_not_copied_again(linears):
    keep_dense_together(linears)
    first, second, third = (module.dense for module in linears)
    assert _adjoin(first, second) and _adjoin(second, third) and not _adjoin(first, third)
    assert [len(run) for run in _runs([first, second, third])] == [sum(WIDTHS)]
    assert [len(run) for run in _runs([first, third, linear(7).unpacked()])] == [96, 160, 96]
    assert torch.equal(_runs([second, third])[0], torch.cat([second, third]))
    assert len({module.dense.untyped_storage().data_ptr() for module in linears}) == 1
    for module in linears:
        assert torch.equal(module.dense, module.unpacked())
    before = [module.dense.data_ptr() for module in linears]
    keep_dense_together(linears)
    assert [module.dense.data_ptr() for module in linears] == before
    torch.nn.ModuleList(linears).to("cpu")  # the Trainer moves models to where they are
    assert [module.dense.data_ptr() for module in linears] == before
    assert all(torch.equal(module.dense, module.unpacked()) for module in linears)


def test_siblings_are_linears_of_one_parent_that_take_inputs_of_one_width():
    from torch import nn

    attention, layer = nn.Module(), nn.Module()
    attention.q, attention.k, attention.o = linear(0), linear(1), linear(2)
    wrapped = nn.Module()  # as an adapter does
    wrapped.base_layer, wrapped.lora_A = linear(3), nn.Linear(64, 4)
    attention.v = wrapped
    layer.attention, layer.down = attention, linear(4)
    names = [[id(module) for module in group] for group in siblings(layer)]
    assert names == [[id(m) for m in (attention.q, attention.k, attention.o, wrapped.base_layer)], [id(layer.down)]]


def test_it_passes_pytorchs_own_checks(linears):
    for width, transposed in ((64, False), (sum(WIDTHS), True)):
        torch.library.opcheck(frozen_products, (torch.randn(5, width), handles(linears), WIDTHS, 64, transposed))
