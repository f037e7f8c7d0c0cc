import pytest
import torch

from lorafit.backbone import FrozenLinear4bit, compute_dtype, load_backbone
from lorafit.backbone.architecture import computes_in_fp8
from lorafit.config import RunConfig
from lorafit.errors import BackboneError
from tiny_models import save_base

CPU = torch.device("cpu")


def test_only_the_frozen_matmuls_are_in_fp8():
    assert compute_dtype(RunConfig(base="x", compute="fp8"), CPU) is torch.bfloat16


@pytest.mark.parametrize("compute", ["auto", "bf16", "fp32"])
def test_nothing_is_in_fp8_unless_the_settings_ask_for_it(compute):
    assert not computes_in_fp8(RunConfig(base="x", compute=compute), CPU)


def test_fp8_is_refused_where_the_device_lacks_it():
    with pytest.raises(BackboneError, match=r"capability 8\.9 or more, and this is a CPU; use compute=bf16"):
        computes_in_fp8(RunConfig(base="x", compute="fp8"), CPU)


def test_fp8_is_refused_for_a_base_that_is_not_in_4_bits():
    with pytest.raises(BackboneError, match="quantization=nf4"):
        computes_in_fp8(RunConfig(base="x", compute="fp8", quantization="none"), CPU)


def test_a_run_trained_in_fp8_still_answers_on_a_device_without_it(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")), compute="fp8")
    with pytest.raises(BackboneError, match="capability"):
        load_backbone(config, device=CPU)
    model = load_backbone(config, device=CPU, exact=True)
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    assert frozen
    assert all(linear.row_scales is None and linear.compute_dtype is torch.bfloat16 for linear in frozen)


@pytest.mark.gpu
def test_on_a_gpu_that_has_it_every_frozen_linear_is_in_fp8(tmp_path):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9")
    base = save_base(tmp_path / "base", intermediate_size=128)  # whole blocks of 64 in every row
    model = load_backbone(RunConfig(base=str(base), compute="fp8"))
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]
    assert frozen
    assert all(linear.row_scales is not None and linear.row_scales.is_cuda for linear in frozen)
