"""An optimizer's state goes to tensors and JSON and back without losing a bit, whichever optimizer it is."""

import json

import pytest
import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from safetensors.torch import load, save

from lorafit.training.checkpoints.snapshot import optimizer_state, restore_optimizer

OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01),
    "fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "8-bit": lambda weights: AdamW8bit(weights, lr=0.01),
    "paged 8-bit": lambda weights: PagedAdamW8bit(weights, lr=0.01),
}


def weights():
    generator = torch.Generator().manual_seed(0)
    # bitsandbytes keeps 8-bit moments from 4,096 elements on
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (8, 3))]


def step(optimizer, made, number):
    for weight in made:
        weight.grad = torch.sin(weight.detach() * 7 + number)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_steps_on_to_the_same_bits(kind):
    through = weights()
    optimizer = OPTIMIZERS[kind](through)
    for number in range(3):
        step(optimizer, through, number)
    tensors, rest = optimizer_state(optimizer)
    kept = load(save(tensors)), json.loads(json.dumps(rest))
    resumed = [torch.nn.Parameter(weight.detach().clone()) for weight in through]
    again = OPTIMIZERS[kind](resumed)
    restore_optimizer(again, *kept)
    for number in range(3, 6):
        step(optimizer, through, number)
        step(again, resumed, number)
    assert all(torch.equal(one, two) for one, two in zip(through, resumed, strict=True))
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert (torch.uint8 in dtypes) == ("8-bit" in kind)


def test_the_copy_does_not_change_as_training_goes_on():
    made = weights()
    optimizer = OPTIMIZERS["adamw"](made)
    step(optimizer, made, 0)
    tensors, _ = optimizer_state(optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    step(optimizer, made, 1)
    assert all(torch.equal(before[name], tensors[name]) for name in tensors)


def test_other_parameter_groups_are_refused():
    made = weights()
    optimizer = OPTIMIZERS["adamw"](made)
    step(optimizer, made, 0)
    split = torch.optim.AdamW([{"params": [weight]} for weight in made])
    with pytest.raises(ValueError, match="other parameter groups"):
        restore_optimizer(split, *optimizer_state(optimizer))
