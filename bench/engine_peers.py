"""The peers of bench/engine.py: transformers + peft + bitsandbytes, Liger, TRL and Unsloth, as their users run them."""

from __future__ import annotations

import argparse
import time

import torch

GIB = 1 << 30
SKIPPED = 3  # steps before the clock starts


def run_dense(options: argparse.Namespace, targets: list[str]) -> dict[str, object]:
    """Forward, backward and optimizer on rows of one length; loss over every token."""
    model = _model(options, targets)
    params = [weight for weight in model.parameters() if weight.requires_grad]
    import bitsandbytes as bnb

    optimizer = bnb.optim.PagedAdamW8bit(params, lr=2e-4)
    random = torch.Generator().manual_seed(1)
    batches = [torch.randint(3, 600, (options.rows, options.length), generator=random).cuda() for _ in range(4)]
    torch.cuda.reset_peak_memory_stats()
    marks = [time.perf_counter()]
    for step in range(options.warm + options.steps):
        ids = batches[step % 4]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in (1, options.warm, options.warm + options.steps):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
    seconds = (marks[-1] - marks[2]) / options.steps
    return {
        "tokens_s": round(options.rows * options.length / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "first_s": round(marks[1] - marks[0], 1),
        "checkpointing": options.checkpointing,
        "loss": round(float(loss), 4),
    }


def _model(options: argparse.Namespace, targets: list[str]) -> torch.nn.Module:
    recomputes = options.checkpointing != "none"
    if options.arm == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            options.folder, max_seq_length=options.length, dtype=torch.bfloat16, load_in_4bit=True
        )
        how = {"none": False, "full": True, "unsloth": "unsloth"}[options.checkpointing]
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=options.dropout, bias="none", target_modules=targets,
            use_gradient_checkpointing=how, random_state=0,
        )  # fmt: skip
        return model.train()
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    if options.arm == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = AutoModelForCausalLM.from_pretrained(options.folder, device_map={"": 0}, dtype=torch.bfloat16)
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=recomputes, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    adapter = LoraConfig(
        r=16, lora_alpha=32, target_modules=targets, lora_dropout=options.dropout, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter).train()


def run_real(options: argparse.Namespace, lengths: list[tuple[int, int]]) -> dict[str, object]:
    """Instruction-shaped rows through the peer's own trainer; steady useful tokens a second from the fourth step on."""
    import numpy as np
    from datasets import Dataset
    from transformers import TrainerCallback

    random = np.random.default_rng(0)
    data = [_row(random, *pair) for pair in lengths]
    useful = sum(len(row["input_ids"]) for row in data)
    trainer = _trainer(options, Dataset, data)
    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, args: object, state: object, *_: object, **__: object) -> None:
            if state.global_step in (1, SKIPPED, state.max_steps):  # type: ignore[attr-defined]
                torch.cuda.synchronize()
                marks.append(time.perf_counter())

    trainer.add_callback(Marks())
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    steps = trainer.state.max_steps
    rate = useful * (steps - SKIPPED) / steps / (marks[-1] - marks[1])
    return {
        "tokens_s": round(rate),
        "tokens": round(useful / steps),
        "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "first_s": round(marks[0] - started, 1),
        "checkpointing": "unsloth" if options.arm == "unsloth_pack" else "full",
    }


def _row(random: object, prompt: int, response: int) -> dict[str, list[int]]:
    ids = random.integers(3, 600, prompt + response).tolist()  # type: ignore[attr-defined]
    ids[-1] = 1
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "attention_mask": [1] * (prompt + response)}


def _trainer(options: argparse.Namespace, dataset: type, data: list[dict[str, list[int]]]) -> object:
    common = {
        "output_dir": "/tmp/engine-" + options.arm,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": True,
        "gradient_checkpointing": True,
        "optim": "paged_adamw_8bit",
        "warmup_steps": 5,
        "lr_scheduler_type": "cosine",
        "disable_tqdm": True,
    }
    plain = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    targets = ["q_proj", "v_proj"]
    if options.arm == "unsloth_pack":
        from trl import SFTConfig, SFTTrainer
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            options.folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
        )
        model = FastLanguageModel.get_peft_model(
            model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=targets,
            use_gradient_checkpointing="unsloth", random_state=0,
        )  # fmt: skip
        settings = SFTConfig(**common, max_length=2048, packing=True)
        return SFTTrainer(model=model, args=settings, train_dataset=dataset.from_list(data), processing_class=tokenizer)
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    model = AutoModelForCausalLM.from_pretrained(options.folder, device_map={"": 0}, dtype=torch.bfloat16)
    model.config.use_cache = False
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.05, task_type="CAUSAL_LM")
    if options.arm == "padded":
        model.enable_input_require_grads()
        return Trainer(
            model=get_peft_model(model, adapter), args=TrainingArguments(**common, **plain),
            train_dataset=dataset.from_list([_padded(row) for row in data]), data_collator=default_data_collator,
        )  # fmt: skip
    from trl import SFTConfig, SFTTrainer

    packs = options.arm == "trl_pack"
    settings = SFTConfig(**common, **plain, max_length=2048, packing=packs, use_liger_kernel=True)
    return SFTTrainer(
        model=model, args=settings, train_dataset=dataset.from_list(data), peft_config=adapter,
        processing_class=AutoTokenizer.from_pretrained(options.folder),
    )  # fmt: skip


def _padded(row: dict[str, list[int]], length: int = 512) -> dict[str, list[int]]:
    missing = length - len(row["input_ids"])
    fill = {"input_ids": 2, "labels": -100, "attention_mask": 0}
    return {name: values + [fill[name]] * missing for name, values in row.items()}
