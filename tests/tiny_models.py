"""Tiny random models of real families, and a byte-level tokenizer, saved as a base would be."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from families_zoo import small_config

VOCABULARY = 260
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "gemma3": {},
    "phi3": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
}


def tiny_config(family: str, **overrides):
    """A configuration of `family` with a few thousand weights."""
    if family == "gemma3":
        return _with_vision_tower(**overrides)
    return AutoConfig.for_model(family.removesuffix("-tied"), **{**SIZES, **FAMILIES[family], **overrides})


def _with_vision_tower(**overrides):
    text = {**SIZES, "sliding_window": 16, "tie_word_embeddings": True, **overrides}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    # the tokens that stand for images lie beyond the bytes of ordinary text
    places = {"image_token_index": 257, "boi_token_index": 258, "eoi_token_index": 259}
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4, **places)


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **overrides) -> Path:
    """A random base of `family` in `folder`, with its tokenizer; biases random too, so that losing one shows."""
    config = tiny_config(family, **overrides)
    # saving puts names into the generator's state, not into the weights: seed right before
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim >= 2:
            # wide enough that predictions are not all alike
            torch.nn.init.normal_(parameter, std=0.08)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder)
    return folder


def save_small(folder: Path, family: str) -> str:
    """A random base of any causal family, without a tokenizer; weights wide enough that experts differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family))
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0..3 are special, 4..259 the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def some_ids(length: int = 24, seed: int = 0) -> torch.Tensor:
    """Random byte ids (1, length)."""
    return torch.randint(4, VOCABULARY - 4, (1, length), generator=torch.Generator().manual_seed(seed))


def stir(adapted: torch.nn.Module, std: float = 0.05) -> None:
    """Make the adapter's B non-zero, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
