"""The start-up self-test costs little, and long rows hide nothing from it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from lorafit.engine import packed, require_isolated
from lorafit.engine.attention.packed import PACKED
from lorafit.engine.isolation import PROBES, TOLERANCE
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
        assert require_isolated(tested, rows).rows == 3
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
        require_isolated(leaky, rows_of(200, 150))


def test_a_base_with_damaged_weights_is_called_that_and_not_a_leak():
    damaged = model()
    with torch.no_grad():
        damaged.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with packed(damaged), pytest.raises(TrainingError, match=r"logits are not finite.*damaged"):
        require_isolated(damaged, rows_of(20, 15))


def mixture_with_sinks():
    """Return gpt-oss of random weights in bf16, whose tokens often lie between two experts."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32}
    config = GptOssConfig(num_local_experts=16, num_experts_per_tok=4, initializer_range=0.1, **shape, **heads)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_experts_may_be_chosen_otherwise_by_rounding_and_not_by_a_leak():
    mixture, rows = mixture_with_sinks(), rows_of(100, 70)
    with packed(mixture):
        assert require_isolated(mixture, rows).relative_difference > TOLERANCE[torch.bfloat16]
        for layer in mixture.model.layers:  # packed attention without sinks, beside rows alone that have them
            layer.self_attn.register_forward_pre_hook(without_sinks)
            layer.self_attn.register_forward_hook(with_sinks)
        with pytest.raises(TrainingError, match="logits differ"):
            require_isolated(mixture, rows)


def without_sinks(module, inputs):
    if module.config._attn_implementation == PACKED:
        module.kept = module.sinks.data
        module.sinks.data = torch.full_like(module.kept, -30.0)


def with_sinks(module, inputs, output):
    module.sinks.data = module.__dict__.pop("kept", module.sinks.data)
