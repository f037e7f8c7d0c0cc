"""The start-up self-test costs little, and long rows hide nothing from it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lorafit.engine import assert_isolated, packed
from lorafit.engine.isolation import PROBES
from lorafit.errors import TrainingError
from tiny_models import tiny_config


def rows_of(*lengths):
    random = np.random.default_rng(0)
    return [(random.integers(4, 250, length).astype(np.int32), np.arange(length) >= 3) for length in lengths]


def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama"))


def test_long_rows_have_few_logits_made():
    tested, seen = model(), []
    tested.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    rows = rows_of(200, 150, 100)
    with packed(tested):
        assert assert_isolated(tested, rows).rows == 3
    assert max(seen) == 3 * PROBES < sum(len(ids) for ids, _ in rows) / 3


class Carrying(nn.Module):
    """Adds to a packed micro-batch what a recurrent state left by the first row would: little, and only at places."""

    def __init__(self, inner, places):
        super().__init__()
        self.inner, self.config, self.places = inner, inner.config, places

    def set_attn_implementation(self, name):
        self.inner.set_attn_implementation(name)

    def forward(self, segments=None, **inputs):
        inputs |= {"segments": segments} if segments is not None else {}
        handle = self.inner.model.norm.register_forward_hook(self.carry) if segments is not None else None
        output = self.inner(**inputs)
        if handle:
            handle.remove()
        return output

    def carry(self, module, inputs, output):
        carried = output.clone()
        carried[0, self.places] += 1e-5 * output[0, 50]
        return carried


@pytest.mark.parametrize("places", [slice(203, 205), slice(348, 349)], ids=["first", "last"])
def test_a_leak_at_either_end_of_a_long_row_is_found(places):
    leaky = Carrying(model(), places)
    with packed(leaky), pytest.raises(TrainingError, match="see each other"):
        assert_isolated(leaky, rows_of(200, 150))


def test_a_base_with_damaged_weights_is_called_that_and_not_a_leak():
    damaged = model()
    with torch.no_grad():
        damaged.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with packed(damaged), pytest.raises(TrainingError, match=r"logits are not finite.*damaged"):
        assert_isolated(damaged, rows_of(20, 15))
