"""The gradient of the first step on real families: lorafit's against transformers + peft + bitsandbytes, row by row."""

import numpy as np
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from lorafit.backbone import load_backbone, nf4_config
from lorafit.config import resolve
from lorafit.engine import collate, packed, summed_loss
from lorafit.engine.loss.vocabulary import rows_per_chunk
from lorafit.methods.lora import attach
from tiny_models import VOCABULARY, save_base, stir

# windows shorter than the rows, and caps that bite, so that leaving one out would show
KINDS = {
    "llama": {},
    "llama-tied": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 16},
    "phi3": {},
    "mixtral": {},
    "qwen3_moe": {},
}
LENGTHS = (20, 33, 7, 40, 25)


def rows():
    """Ids and masks as training has them: a prompt that is not supervised, an answer that is."""
    random = np.random.default_rng(0)
    return [(random.integers(4, VOCABULARY - 4, length), np.arange(length) >= length // 3) for length in LENGTHS]


def targets(model):
    """Every linear of a decoder layer; a mixture's experts are no linears."""
    wanted = "q_proj k_proj v_proj qkv_proj o_proj gate_proj up_proj gate_up_proj down_proj".split()
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return [name for name in wanted if name in leaves]


def plain(base, config):
    """transformers + peft + bitsandbytes, as their documentation has it, in fp32 and in training mode."""
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=nf4_config(torch.float32)
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 3:  # bitsandbytes quantizes linears alone
            packed_4bit, state = quantize_4bit(parameter.data.flatten(0, 1), compress_statistics=True, quant_type="nf4")
            parameter.data.copy_(dequantize_4bit(packed_4bit, state).view_as(parameter))
    names = targets(model)
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora).train(), tuple(names)


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def one_by_one(model):
    """Each row alone through transformers' own loss, whose mean over supervised tokens is undone."""
    for ids, mask in rows():
        ids = torch.from_numpy(ids)[None]
        labels = ids.masked_fill(~torch.from_numpy(mask)[None], -100)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        (loss * (labels[:, 1:] != -100).sum()).backward()
    return gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_steps_gradient_is_that_of_transformers_peft_and_bitsandbytes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafit.engine.loss.vocabulary.CHUNK_BYTES", 16 * VOCABULARY * 4)
    assert rows_per_chunk(VOCABULARY, 4) == 16 < sum(LENGTHS) / 2  # several chunks, the last one short
    base = str(save_base(tmp_path / "base", kind, **KINDS[kind]))
    config = resolve(flags={"base": base, "rank": 4, "dropout": 0.0}).config
    reference, names = plain(base, config)
    ours = attach(load_backbone(config, device="cpu"), config, names).train()
    stir(ours)
    weights = {name: weight for name, weight in ours.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name])
    with packed(ours):
        summed_loss(ours, collate(rows())).backward()
    wanted, got = one_by_one(reference), gradients(ours)
    assert wanted.keys() == got.keys() and len(got) >= 16
    for name, gradient in wanted.items():
        assert float(cosine_similarity(gradient.flatten(), got[name].flatten(), dim=0)) >= 0.999, name
        assert float((gradient - got[name]).norm() / gradient.norm()) < 1e-3, name
