import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.methods.lora import attach
from tiny_models import save_base


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_leaves_no_gradient_anywhere(tmp_path, set_to_none):
    config = resolve(flags={"base": str(save_base(tmp_path)), "targets": "all-linear", "rank": 4}).config
    model = attach(load_backbone(config), config)
    model.get_input_embeddings().weight.requires_grad_(True)  # not only adapters may train
    model(input_ids=torch.arange(4, 12)[None]).logits.sum().backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)
    model.zero_grad(set_to_none)
    if set_to_none:
        assert all(weight.grad is None for weight in model.parameters())
    else:
        assert all(not weight.grad.any() for weight in trained)
