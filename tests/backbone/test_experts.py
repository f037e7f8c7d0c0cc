"""Experts in 4 bits: what loading makes of them, and that they compute as transformers does with dense weights."""

import pytest
import torch

from lorafit.backbone import (
    FrozenExpertsLinear,
    base_skeleton,
    dequantize_linears,
    frozen_weights,
    load_backbone,
    unfreeze_experts,
    with_stored_weights,
)
from lorafit.backbone.experts import SUFFIX, experts_to_quantize
from lorafit.config import RunConfig
from lorafit.memory.footprint import NF4_BYTES
from tiny_models import save_base, save_small, some_ids

# a fused gate, biases and weights that lie transposed, no gate, experts in some layers only, stored fused
KINDS = ("qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "granitemoe", "qwen3_next", "minimax_m2")


def logits_and_gradient(model):
    """The logits, and the gradient of their squares' sum with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(some_ids(40)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (logits**2).sum().backward()
    return logits.detach(), embedded.grad


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_4_bits_compute_what_transformers_computes_with_the_dequantized_ones(kind, tmp_path):
    base = save_small(tmp_path, kind)
    count = len(experts_to_quantize(base_skeleton(RunConfig(base=base))))
    model = load_backbone(RunConfig(base=base), attn_implementation="eager").eval()
    experts = [module for module in model.modules() if isinstance(module, FrozenExpertsLinear)]
    assert len(experts) == count > 0
    ours = logits_and_gradient(model)
    theirs = logits_and_gradient(dequantize_linears(unfreeze_experts(model)))
    assert not any(name.endswith(SUFFIX) for name, _ in model.named_modules())
    for mine, wanted in zip(ours, theirs, strict=True):
        assert float((mine - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_experts_take_half_a_byte_a_weight(tmp_path):
    base = save_base(tmp_path, "qwen3_moe", num_experts=32, moe_intermediate_size=128, hidden_size=128)
    model = load_backbone(RunConfig(base=str(base)), dense_budget_bytes=0)
    held = [layer for layer in frozen_weights(model).values() if isinstance(layer, FrozenExpertsLinear)]
    tensors = {tensor.data_ptr(): tensor.nbytes for layer in held for tensor in layer.held() if torch.is_tensor(tensor)}
    weights = sum(layer.in_features * layer.out_features for layer in held)
    assert weights == 2 * 32 * 3 * 128 * 128
    assert sum(tensors.values()) == pytest.approx(NF4_BYTES * weights, rel=0.02)  # the code tables are the rest


def test_no_dense_experts_stay_between_forward_and_backward(tmp_path):
    base = save_base(tmp_path, "qwen3_moe", num_experts=7, moe_intermediate_size=48)
    model = load_backbone(RunConfig(base=str(base)), dense_budget_bytes=0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits_and_gradient(model)
    dense = {4 * 7 * 96 * 64, 4 * 7 * 48 * 64}
    assert len(kept) > 50 and not any(tensor.untyped_storage().nbytes() in dense for tensor in kept)


def test_experts_can_compute_with_their_weights_as_stored(tmp_path):
    base = save_base(tmp_path, "qwen3_moe")
    config = RunConfig(base=str(base))
    model, stored = load_backbone(config), load_backbone(config.model_copy(update={"quantization": "none"}))
    before, wanted = (logits_and_gradient(each)[0] for each in (model, stored))
    with with_stored_weights(model, base) as has_weights:
        assert has_weights
        found = logits_and_gradient(model)[0]
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((before - wanted).abs().max() / wanted.abs().max()) > 1e-3
    assert torch.equal(logits_and_gradient(model)[0], before)
