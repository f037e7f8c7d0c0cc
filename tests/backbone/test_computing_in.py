import pytest
import torch

from lorafit.adapters import attach
from lorafit.backbone import computing_in, load_backbone
from lorafit.config import RunConfig
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


def test_an_error_inside_puts_everything_back(tmp_path):
    config = RunConfig(base=str(save_base(tmp_path / "base")))
    model = load_backbone(config)
    before = model(some_ids()).logits
    with pytest.raises(KeyError), computing_in(model, torch.bfloat16):
        raise KeyError
    assert torch.equal(model(some_ids()).logits, before)
