"""What the fault campaign trains: the same tiny run through lorafit, and through transformers.Trainer with peft."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lorafit.api.train import train
from lorafit.demo import BASE, TASKS
from lorafit.demo.tasks import rows as task_rows

STEPS, EXAMPLES, ROWS = 12, 4, 40
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def make_base(folder: Path) -> Path:
    """A random two-layer Llama with the demo's tokenizer."""
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, num_key_value_heads=2, head_dim=32, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(BASE / name, folder / name)
    return folder


def write_rows(path: Path, seed: int = 0) -> Path:
    """Instruction rows of a demo task."""
    path.write_text("".join(json.dumps(row) + "\n" for row in task_rows(TASKS["tickets"], seed, ROWS)))
    return path


class Subject(Protocol):
    """Something that trains in a folder, goes on when asked again, and leaves a result."""

    name: str

    def train(self, folder: Path, callbacks: list[TrainerCallback]) -> None: ...

    def checkpoints(self, folder: Path) -> list[Path]: ...

    def result(self, folder: Path) -> dict[str, str]: ...

    def said(self, folder: Path) -> str: ...

    def resumed_at(self, folder: Path) -> list[int]: ...

    def with_rows(self, rows: Path) -> "Subject": ...

    def with_rate(self, rate: float) -> "Subject": ...


@dataclass(frozen=True)
class Lorafit:
    """The public path: `lorafit.train`, the same call each time."""

    rows: Path
    base: Path
    settings: dict[str, Any] = field(default_factory=dict)
    name = "lorafit"

    def train(self, folder: Path, callbacks: list[TrainerCallback]) -> None:
        settings = {"max_steps": STEPS, "save_steps": 1, "eval_steps": 3, "examples_per_step": EXAMPLES, "lr": 5e-3}
        given = {**settings, "holdout": 0.2, "rank": 32, "dropout": 0.1, **self.settings}
        train(self.rows, str(self.base), out=folder, callbacks=callbacks, **given)

    def checkpoints(self, folder: Path) -> list[Path]:
        found = (folder / "checkpoints").glob("step-*") if (folder / "checkpoints").is_dir() else ()
        return sorted(path for path in found if path.name[5:].isdigit())

    def result(self, folder: Path) -> dict[str, str]:
        """Hashes of what the run is for: adapter, optimizer and random states at the end, and the metrics file."""
        last = self.checkpoints(folder)[-1]
        files = {
            "adapter": folder / "adapter" / "adapter_model.safetensors",
            "optimizer": last / "optimizer.safetensors",
            "random": last / "random.safetensors",
            "metrics": folder / "metrics.jsonl",
        }
        return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}

    def said(self, folder: Path) -> str:
        events = folder / "events.jsonl"
        return events.read_text() if events.is_file() else ""

    def resumed_at(self, folder: Path) -> list[int]:
        """The step of every resume so far."""
        events = [json.loads(line) for line in self.said(folder).splitlines()]
        return [event["step"] for event in events if event["kind"] == "resumed"]

    def with_rows(self, rows: Path) -> "Lorafit":
        return replace(self, rows=rows)

    def with_rate(self, rate: float) -> "Lorafit":
        return replace(self, settings={**self.settings, "lr": rate})


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True)
class Transformers:
    """transformers.Trainer over a peft model, resuming from the newest checkpoint as its documentation says."""

    rows: Path
    base: Path
    rate: float = 5e-3
    name = "Trainer"

    def train(self, folder: Path, callbacks: list[TrainerCallback]) -> None:
        trainer = self._trainer(folder, callbacks)
        folder.mkdir(parents=True, exist_ok=True)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
        trainer.save_model(str(folder / "adapter"))

    def _trainer(self, folder: Path, callbacks: list[TrainerCallback]) -> Trainer:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        tokenizer.pad_token = tokenizer.eos_token
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        adapted = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, lora_dropout=0.1, target_modules=["q_proj"]))
        encoded = [self._encode(tokenizer, json.loads(line)) for line in self.rows.read_text().splitlines()]
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=EXAMPLES,
            learning_rate=self.rate,
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        return Trainer(
            model=adapted,
            args=arguments,
            train_dataset=_Rows(encoded[:32]),
            eval_dataset=_Rows(encoded[32:]),
            data_collator=lambda rows: _padded(rows, tokenizer.pad_token_id),
            callbacks=callbacks,
        )

    def _encode(self, tokenizer: Any, row: dict[str, str]) -> dict[str, Any]:
        prompt = tokenizer(f"{row['instruction']}\n{row['input']}\n")["input_ids"]
        answer = [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def checkpoints(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))

    def result(self, folder: Path) -> dict[str, str]:
        last = self.checkpoints(folder)[-1]
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        kept = [[entry.get(key) for key in ("step", "loss", "eval_loss", "grad_norm")] for entry in history]
        flat = {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
        metrics = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        return {"adapter": _digest(adapter), "optimizer": _digest(flat), "metrics": metrics}

    def said(self, folder: Path) -> str:
        return ""

    def resumed_at(self, folder: Path) -> list[int]:
        return []

    def with_rows(self, rows: Path) -> "Transformers":
        return replace(self, rows=rows)

    def with_rate(self, rate: float) -> "Transformers":
        return replace(self, rate=rate)


def adapter_is_finite(folder: Path) -> bool:
    """True when no weight of the final adapter is NaN or infinite."""
    return all(bool(t.isfinite().all()) for t in load_file(folder / "adapter" / "adapter_model.safetensors").values())


def _padded(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", -100), "attention_mask": mask}


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())
    return digest.hexdigest()


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked children must not inherit its threads
