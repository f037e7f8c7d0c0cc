"""make_base: train the bundled base: `python -m lorafit.demo.make_base OUT`.

It takes two to three minutes on one H200. A byte-level BPE tokenizer of 1,024 entries and a Llama of 3.5 M parameters
are both trained from nothing on `text.document`. Muon trains the matrices, AdamW the rest (K. Jordan et al., 2024),
with warm-up and linear decay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.demo.text import document

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
CONTEXT, BATCH = 256, 128
SHARDS, DOCUMENTS_PER_SHARD = 16, 24_000
ARCHITECTURE = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    pad_token_id=PAD_ID,
    tie_word_embeddings=True,
)


def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with single digits, trained on six thousand documents.

    It puts BOS in front of each text.
    """
    random = Random(1000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE.vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([document(random) for _ in range(6000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def _shard(job: tuple[str, int]) -> torch.Tensor:
    serialized, seed = job
    tokenizer, random = Tokenizer.from_str(serialized), Random(seed)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([document(random) for _ in range(DOCUMENTS_PER_SHARD)]):
        ids += [*encoding.ids, EOS_ID]
    return torch.tensor(ids, dtype=torch.int16)


def make_corpus(tokenizer: Tokenizer, processes: int) -> torch.Tensor:
    """Return token ids (sequences, CONTEXT), int16, independent of the number of processes."""
    jobs = [(tokenizer.to_str(), seed) for seed in range(SHARDS)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        stream = torch.cat(pool.map(_shard, jobs))
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def _batches(corpus: torch.Tensor, device: str) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(corpus), generator=generator).split(BATCH):
            if len(index) == BATCH:
                yield corpus[index.to(device)].long()


def _optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95)),
    ]


def pretrain(corpus: torch.Tensor, steps: int, device: str) -> tuple[LlamaForCausalLM, float]:
    """Train on next tokens for `steps` steps; return the model and its last loss."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(ARCHITECTURE).to(device)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    compiled: Any = torch.compile(loss_of) if device == "cuda" else loss_of
    optimizers = _optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches, loss = _batches(corpus.to(device), device), torch.zeros(())
    for step in range(steps):
        share = step / steps
        scale = min(1, (step + 1) / 50) * (1 if share < 0.6 else max(0.02, (1 - share) / 0.4))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model, float(loss.detach())


def main() -> None:
    """Make tokenizer, corpus and model, and save them in transformers' format (bf16 safetensors)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--processes", type=int, default=16)
    arguments = parser.parse_args()
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = make_tokenizer()
    corpus = make_corpus(tokenizer, arguments.processes)
    model, loss = pretrain(corpus, arguments.steps, device)
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = BOS_ID, EOS_ID
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=1024
    )
    wrapped.save_pretrained(arguments.out)
    made = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "tokens": corpus.numel(),
        "steps": arguments.steps,
        "loss": round(loss, 3),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
    }
    (arguments.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
