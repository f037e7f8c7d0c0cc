import pytest
import torch

from lorafit.errors import VerificationError
from lorafit.methods.lora import Delta, Deltas

NAME = "model.layers.0.self_attn.q_proj.weight"


def deltas(scale=2.0):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 32, generator=generator), torch.randn(16, 4, generator=generator)
    return Deltas({NAME: Delta(a, b, scale)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_exact_in_fp32_and_rounded_once(dtype):
    weight = torch.randn(16, 32).to(dtype)
    delta = deltas()[NAME]
    exact = weight.double() + 2.0 * delta.b.double() @ delta.a.double()
    merged = deltas().merged(NAME, weight)
    assert merged.dtype == dtype
    # half a unit in the last place, plus fp32's own error
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-5)


def test_other_weights_come_back_untouched():
    weight = torch.randn(3, 3)
    assert deltas().merged("model.norm.weight", weight) is weight


def test_a_delta_of_another_shape_is_an_error():
    with pytest.raises(VerificationError, match="does not fit"):
        deltas().merged(NAME, torch.randn(16, 16))


def test_a_target_that_the_base_lacks_is_an_error():
    deltas().check_found({NAME, "other"})
    with pytest.raises(VerificationError, match="q_proj"):
        deltas().check_found({"other"})
