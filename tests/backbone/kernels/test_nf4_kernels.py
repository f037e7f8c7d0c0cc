import importlib.util
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

import lorafit.backbone
from lorafit.backbone.kernels.frozen_linear_op import code_values, kernel_takes, unpack_e4m3, unpack_weight

KERNELS = Path(lorafit.backbone.__file__).parent.joinpath("kernels", "nf4_kernels.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, for its interpreter"
)
SHAPES = [(64, 64), (96, 128), (33, 72), (5, 8), (1, 64), (130, 64)]


def quantised(shape, block=64, double=True, device="cpu", seed=0):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=double, quant_type="nf4")
    nested = (state.state2.code, state.state2.absmax, state.offset) if double else (None, None, None)
    return packed, (state.absmax, *nested), bnb.dequantize_4bit(packed, state), state


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels as Triton's interpreter runs them on a CPU: a copy, for other tests want them compiled."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    specification = importlib.util.spec_from_file_location("interpreted_nf4_kernels", KERNELS)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@needs_triton
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("shape", "block"), [*((shape, 64) for shape in SHAPES), ((64, 128), 32), ((32, 512), 4096)])
def test_interpreted_the_kernel_gives_the_bits_of_bitsandbytes(interpreted, shape, block, double):
    packed, scales, expected, _ = quantised(shape, block, double)
    table = code_values(packed.device)
    assert torch.equal(interpreted.unpack(packed, scales, table, None, block, torch.empty(shape)), expected)
    # Triton's interpreter rounds bf16 towards zero, a compiled kernel to nearest: only to within a bit here
    narrow = interpreted.unpack(packed, scales, table, None, block, torch.empty(shape, dtype=torch.bfloat16))
    assert ((narrow.float() - expected).abs() <= 2.0**-7 * expected.abs()).all()


@needs_triton
@pytest.mark.parametrize(("shape", "block"), [((96, 128), 64), ((16, 256), 256), ((48, 64), 32)])
def test_interpreted_both_orientations_hold_the_same_e4m3_values(interpreted, shape, block):
    packed, scales, dense, _ = quantised(shape, block)
    rows, columns = shape
    inverse = 448 / dense.abs().amax(1)
    table = code_values(packed.device)
    scaled = interpreted.unpack(packed, scales, table, inverse, block, torch.empty(shape))
    torch.testing.assert_close(scaled, dense * inverse[:, None], rtol=1e-6, atol=0)
    straight = interpreted.unpack(packed, scales, table, inverse, block, torch.empty(shape, dtype=torch.float8_e4m3fn))
    across = torch.empty(columns, rows, dtype=torch.float8_e4m3fn)
    interpreted.unpack_transposed(packed, scales, table, inverse, block, across)
    assert torch.equal(across.view(torch.uint8).t(), straight.view(torch.uint8))


def test_a_cpu_keeps_bitsandbytes_own_path():
    packed, scales, _, _ = quantised((64, 64))
    assert not kernel_takes(packed, scales, "nf4", 64 * 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_on_a_gpu_the_kernel_gives_the_bits_of_bitsandbytes(block, double, dtype):
    for shape in [*SHAPES, (512, 896), (272, 4096)]:
        packed, scales, _, state = quantised(shape, block, double, "cuda")
        state.dtype = dtype
        assert kernel_takes(packed, scales, "nf4", shape[0] * shape[1])
        found = unpack_weight(packed, scales, block, "nf4", *shape, dtype)
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "block"), [((96, 128), 64), ((272, 4096), 4096), ((1024, 512), 256), ((16, 64), 64)])
def test_on_a_gpu_both_orientations_hold_what_a_cpu_makes_of_the_weight(shape, block):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of compute capability 8.9")
    packed, scales, dense, _ = quantised(shape, block, device="cuda")
    inverse = 448 / dense.abs().amax(1)
    on_cpu = [tensor.cpu() for tensor in scales]
    expected = unpack_e4m3(packed.cpu(), tuple(on_cpu), block, inverse.cpu(), shape[1], False).view(torch.uint8)
    straight = unpack_e4m3(packed, scales, block, inverse, shape[1], False).view(torch.uint8).cpu()
    across = unpack_e4m3(packed, scales, block, inverse, shape[1], True).view(torch.uint8).cpu()
    assert torch.equal(straight, expected)
    assert torch.equal(across.t(), expected)
