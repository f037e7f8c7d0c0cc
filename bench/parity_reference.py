"""The yardstick of bench/parity.py: LoRA over a 4-bit base with transformers, peft and bitsandbytes as they come.

Nothing of lorafit is imported here; a test holds that. Rows come as (ids (tokens,), supervised (tokens,)) pairs of
numpy arrays, already in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler

IGNORED = -100

Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """What both sides of a comparison must have alike; `schedule` is transformers' name of it."""

    rank: int
    alpha: float
    lr: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float]
    eps: float


def losses(
    folder: str,
    steps: Sequence[Sequence[Row]],
    adapters: Mapping[str, torch.Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
    rows_per_forward: int,
) -> list[float]:
    """Each step's loss, from `adapters` on: the mean over the step's supervised tokens, before its update.

    `adapters` are the initial weights by PEFT's names. `rows_per_forward` rows are right-padded into one forward.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = adapted(base(folder, dtype, device), adapters, recipe)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay
    )
    schedule = get_scheduler(recipe.schedule, optimizer, recipe.warmup_steps, len(steps))
    found = []
    for rows in steps:
        found.append(backward(model, rows, rows_per_forward, dtype))
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def losses_at(
    folder: str,
    steps: Sequence[Sequence[Row]],
    adapters: Sequence[Mapping[str, torch.Tensor]],
    recipe: Recipe,
    dtype: torch.dtype,
    rows_per_forward: int,
) -> list[float]:
    """Each step's loss at that step's own `adapters`: nothing is trained here, so that no difference can grow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = adapted(base(folder, dtype, device), adapters[0], recipe)
    found = []
    for rows, weights in zip(steps, adapters, strict=True):
        model.load_state_dict(dict(weights), strict=False)
        with torch.no_grad():
            found.append(sum(loss.item() for loss in forwards(model, rows, rows_per_forward, dtype)))
    return found


def gradients(
    folder: str,
    rows: Sequence[Row],
    adapters: Mapping[str, torch.Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
    rows_per_forward: int,
) -> dict[str, torch.Tensor]:
    """The gradient of one step over `rows` in each of `adapters`, by PEFT's names, on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = adapted(base(folder, dtype, device), adapters, recipe)
    backward(model, rows, rows_per_forward, dtype)
    return gradients_of(model)


def exact_gradients(
    folder: str, rows: Sequence[Row], adapters: Mapping[str, torch.Tensor], recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The same in fp32, each row alone, over the base's weights as bf16 has them: what rounding then costs, aside."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = base(folder, torch.bfloat16, device).dequantize().to(torch.float32)
    model = adapted(dense, adapters, recipe)
    backward(model, rows, 1, torch.float32)
    return gradients_of(model)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of the gradients of what trains."""
    trained = [(name, weight.grad) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: grad.detach().cpu().clone() for name, grad in trained if grad is not None}


def base(folder: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """The base in NF4 with double quantisation, as QLoRA's users load it (arXiv:2305.14314)."""
    profile = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, quantization_config=profile
    )


def adapted(model: torch.nn.Module, adapters: Mapping[str, torch.Tensor], recipe: Recipe) -> torch.nn.Module:
    """PEFT's LoRA, without dropout, on the modules that `adapters` are for, and with those weights."""
    targets = sorted({name.split(".lora_")[0].rsplit(".", 1)[1] for name in adapters})
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(adapters), f"adapters differ: {sorted(trained ^ set(adapters))[:4]}"
    model.load_state_dict(dict(adapters), strict=False)
    return model.train()


def backward(model: torch.nn.Module, rows: Sequence[Row], rows_per_forward: int, dtype: torch.dtype) -> float:
    """Gradients of one step, accumulated over its forwards; returns its loss."""
    total = 0.0
    for loss in forwards(model, rows, rows_per_forward, dtype):
        loss.backward()
        total += loss.item()
    return total


def forwards(
    model: torch.nn.Module, rows: Sequence[Row], rows_per_forward: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The losses of a step's forwards, whose sum is the mean over all its supervised tokens."""
    supervised = sum(int(mask[1:].sum()) for _, mask in rows)
    device = next(model.parameters()).device
    halves = device.type == "cuda" and dtype is not torch.float32  # as Trainer's bf16=True
    for start in range(0, len(rows), rows_per_forward):
        batch = {name: value.to(device) for name, value in padded(rows[start : start + rows_per_forward]).items()}
        with torch.autocast(device.type, dtype=dtype, enabled=halves):
            # num_items_in_batch: the sum of token losses divided by this, as Trainer does when it accumulates
            loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
        yield loss


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (rows, longest), right-padded; labels are -100 where nothing is learnt."""
    shape = len(rows), max(len(ids) for ids, _ in rows)
    ids, seen = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for place, (row, mask) in enumerate(rows):
        tokens = torch.from_numpy(np.asarray(row, dtype=np.int64))
        ids[place, : len(row)], seen[place, : len(row)] = tokens, 1
        labels[place, : len(row)] = tokens.masked_fill(~torch.from_numpy(np.asarray(mask, dtype=bool)), IGNORED)
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}
