"""A random Llama-shaped base in NF4 with a small byte-level tokenizer: speed and memory do not depend on its values."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
               "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{m.role}}|>\n{{m.content}}<|eos|>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def make(out: str, size: str) -> None:
    """Write `out`-bf16 and, quantised, `out`; prints one JSON line."""
    started = time.time()
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, rope_theta=500000.0, dtype=torch.bfloat16, **SIZES[size])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = 0, 1, 2
    tokenizer = make_tokenizer()
    with torch.no_grad():  # answers are words, and no special token ends them early
        rows = model.get_output_embeddings().weight
        rows[:3], rows[len(tokenizer) :] = 0, 0
    model.save_pretrained(out + "-bf16")
    tokenizer.save_pretrained(out + "-bf16")
    del model
    profile = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    quantised = LlamaForCausalLM.from_pretrained(
        out + "-bf16", device_map={"": device}, dtype=torch.bfloat16, quantization_config=profile
    )
    quantised.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(json.dumps({"made": out, "s": round(time.time() - started, 1)}))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """600 tokens; a digit is always one of its own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 50], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        model_max_length=8192,
    )  # fmt: skip
    fast.chat_template = TEMPLATE + PROMPT
    return fast
