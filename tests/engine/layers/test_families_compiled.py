"""Every family's layers under the policy: compiled whole, and with the gradient of layers that run as written."""

import numpy as np
import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import DecoderLayers, collate, packed, summed_loss
from lorafit.methods.lora import attach
from tiny_models import FAMILIES, save_base, stir

# where two of four experts are chosen, rounding in bf16 sends tokens to others: all four take part here
ALL_EXPERTS = {"mixtral": {"num_experts_per_tok": 4}, "qwen3_moe": {"num_experts_per_tok": 4}}
BACKEND = "aot_eager_decomp_partition"  # traced and cut as on a GPU, and quicker than compiling


def adapted(family, folder, **settings):
    base = save_base(folder / "base", family, num_hidden_layers=2, **ALL_EXPERTS.get(family, {}))
    config = resolve(flags={"base": str(base), "dropout": 0.0, "targets": "all-linear", "rank": 4, **settings}).config
    model = attach(load_backbone(config, dense_budget_bytes=0), config)
    stir(model)
    return model.train()


def gradient(model, lengths, device, autocast):
    random = np.random.default_rng(0)
    rows = [(random.integers(4, 250, length), np.arange(length) > 0) for length in lengths]
    model.zero_grad()
    with packed(model), torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        summed_loss(model, collate(rows).to(device)).backward()
    return torch.cat([weight.grad.flatten().float() for weight in model.parameters() if weight.requires_grad])


def compare(model, level, device, backend, bound, autocast=False):
    layers = len(DecoderLayers(model, compiled=False))
    spec = "keep" if level == "keep" else f"{level}={layers}"
    driven = DecoderLayers(model, MemoryPolicy.parse(spec, layers), backend=backend)
    for lengths in ((40, 21, 9), (64,)):
        wanted = gradient(model, lengths, device, autocast)
        with driven:
            got = gradient(model, lengths, device, autocast)
        assert float((got - wanted).norm() / wanted.norm()) < bound, lengths
    assert driven.compiled, driven.notes


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "qwen3_moe"])
@pytest.mark.slow
def test_layers_compile_whole_and_have_the_gradient_of_eager_ones(family, tmp_path):
    compare(adapted(family, tmp_path), "keep", "cpu", BACKEND, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["keep", "feed_forward"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_so_they_do_on_a_gpu_in_bf16(family, level, tmp_path):
    # what the compiler fuses is rounded once, and not after each operation
    compare(adapted(family, tmp_path, compute="bf16"), level, "cuda", "inductor", 5e-2, autocast=True)
