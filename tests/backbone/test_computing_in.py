import pytest
import torch

from lorafit.backbone import computing_in, fresh_weights, load_backbone, rounding_activations
from lorafit.config import RunConfig
from lorafit.methods.lora import attach
from tiny_models import save_base, some_ids, stir


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_inside_it_is_the_model_loaded_in_that_precision_and_outside_the_one_it_was(tmp_path, quantization):
    config = RunConfig(base=str(save_base(tmp_path / "base")), quantization=quantization, dropout=0.0)
    model = attach(load_backbone(config), config)
    stir(model)
    before = model(some_ids()).logits
    twin = attach(load_backbone(config.model_copy(update={"compute": "bf16"})), config)
    stir(twin)
    with computing_in(model, torch.bfloat16):
        inside = model(some_ids()).logits
        assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".lora_" in name)
    assert torch.equal(inside, twin(some_ids()).logits)
    assert torch.equal(model(some_ids()).logits, before)
    assert not torch.equal(inside.float(), before)


@pytest.mark.parametrize("budget", [None, 0], ids=["dense", "packed"])
def test_weights_are_rounded_and_sums_stay_in_fp32(tmp_path, budget):
    config = RunConfig(base=str(save_base(tmp_path / "base", dtype=torch.float32)))
    model = load_backbone(config, dense_budget_bytes=budget)
    before = model(some_ids()).logits
    rounded = load_backbone(config.model_copy(update={"quantization": "none"}))
    rounded.load_state_dict({w.parameter: w.tensor.bfloat16() for w in fresh_weights(config, "quantized")})
    with computing_in(model, torch.float32, torch.bfloat16):
        torch.testing.assert_close(model(some_ids()).logits, rounded(some_ids()).logits, rtol=0, atol=1e-5)
    assert torch.equal(model(some_ids()).logits, before)
    assert not torch.allclose(before, rounded(some_ids()).logits, rtol=0, atol=1e-5)


def test_rounding_weights_and_activations_gives_the_numbers_of_a_model_in_bf16(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")), dropout=0.0)
    model, native = attach(load_backbone(config), config), attach(load_backbone(config), config)
    for each in (model, native):
        stir(each)
    exact = model(some_ids()).logits
    with computing_in(native, torch.bfloat16):
        expected = native(some_ids()).logits.float()
    with computing_in(model, torch.float32, torch.bfloat16), rounding_activations(model, torch.bfloat16):
        found = model(some_ids()).logits
    assert torch.equal(found, found.bfloat16().float())
    # as much noise, though not the same: sums are taken in another order
    noise = (expected - exact).std()
    assert 0.5 * noise < (found - exact).std() < 2 * noise
    assert torch.equal(model(some_ids()).logits, exact)


def test_an_error_inside_puts_everything_back(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")))
    model = load_backbone(config)
    before = model(some_ids()).logits
    with pytest.raises(KeyError), computing_in(model, torch.bfloat16):
        raise KeyError
    assert torch.equal(model(some_ids()).logits, before)
