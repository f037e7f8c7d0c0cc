"""AdapterTrainingPipeline: the steps of a run one by one, with transformers' objects between them."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from lorafit.api.preflight import add_new_rows
from lorafit.backbone import load_backbone, nf4_config, redirect_library_logs
from lorafit.config import RunConfig, base_folder, resolve, served_stop_ids
from lorafit.data import Encoded, Record, Rows, Template, TextTokenizer, parse_rows
from lorafit.data.new_tokens.grown_settings import with_new_tokens
from lorafit.engine import VocabularyLoss
from lorafit.engine.loss.vocabulary import IGNORED
from lorafit.errors import DataError, UsageError
from lorafit.methods import method_of
from lorafit.methods.lora import Lora, lora_config
from lorafit.objectives import objective_of
from lorafit.shapes import ModelShape, resolve_targets
from lorafit.training import EventLog, RunContext, TrainingLoop
from lorafit.training.trainer import LorafitTrainer

NAMED_ROWS = 3

QUANT_PROFILE = nf4_config(torch.bfloat16)
"""NF4 with double quantization, as a transformers BitsAndBytesConfig."""

ADAPTER_CONFIG = lora_config(RunConfig(), ("q_proj", "v_proj"))
"""The recipe's adapters, as a peft LoraConfig: r=16, alpha=32, dropout 0.05, q_proj and v_proj."""

TRAINING_HYPERPARAMS = MappingProxyType(
    {
        name: getattr(RunConfig(), name)
        for name in (
            "lr",
            "schedule",
            "warmup",
            "weight_decay",
            "max_grad_norm",
            "optimizer",
            "epochs",
            "examples_per_step",
            "memory_policy",
            "seed",
        )
    }
)
"""The recipe's optimization, as keys of RunConfig; `build_trainer` takes any of them."""


class AdapterTrainingPipeline:
    """Run the stages of `lorafit.train` one by one.

    pipeline = AdapterTrainingPipeline("path/or/hub-id")
    model = pipeline.inject_adapters(pipeline.load_frozen_backbone())
    rows = pipeline.tokenize_dataset(pipeline.format_instruction_data(raw_rows))
    pipeline.build_trainer(model, rows).train()
    """

    def __init__(self, base_model_id: str, adapter_rank: int = 16, scaling_factor: float = 32, **settings: Any) -> None:
        """Resolve the settings. `scaling_factor` is LoRA's alpha; `settings` are further keys of RunConfig."""
        given = {**settings, "base": base_model_id, "rank": adapter_rank, "alpha": float(scaling_factor)}
        self.config = with_new_tokens(resolve(flags=given)).config
        tokenizer = TextTokenizer.from_base(self.config.base, self.config.revision)
        self.template = Template.for_tokenizer(tokenizer, self.config.template)
        self.base_model_id, self.adapter_rank, self.scaling_factor = base_model_id, adapter_rank, scaling_factor

    @cached_property
    def tokenizer(self) -> Any:
        """Return transformers' tokenizer of the base, with the chat template of training."""
        with redirect_library_logs():
            tokenizer = AutoTokenizer.from_pretrained(self._base, trust_remote_code=False)
        tokenizer.chat_template = self.template.jinja_for_export
        return tokenizer

    @property
    def quantization_config(self) -> Any:
        """Return transformers' BitsAndBytesConfig of the frozen base; None without quantization."""
        return QUANT_PROFILE if self.config.quantization == "nf4" else None

    @property
    def lora_config(self) -> Any:
        """Return peft's LoraConfig of the adapters."""
        shape = ModelShape.from_base(self.config.base, self.config.revision)
        names = resolve_targets(self.config.targets, shape.projections, shape.family)
        experts = tuple(name for name in names if any(part.stacked for part in shape.named((name,))))
        linears = tuple(name for name in names if name not in experts)
        return lora_config(self.config, linears, experts, shape.experts_per_token)

    @property
    def _base(self) -> Path:
        return base_folder(self.config.base, self.config.revision)

    def load_frozen_backbone(self) -> Any:
        """Return the base in 4 bits (or as `quantization` says), fully frozen. Raises BackboneError.

        Its generation ends at the trained stop ids and at the base's own.
        """
        add_new_rows(self.config)
        with redirect_library_logs():
            model: Any = load_backbone(self.config)
        model.generation_config.eos_token_id = list(served_stop_ids(self.template.stop_ids, self._base))
        return model

    def inject_adapters(self, model: Any) -> Any:
        """Return `model` with fresh adapters, and print trainable and total parameters. Raises AdapterError."""
        adapted: Any = Lora().prepare(model, self.config)
        adapted.print_trainable_parameters()
        return adapted

    def format_instruction_data(self, raw_rows: Iterable[Mapping[str, Any]]) -> Dataset:
        """Return a Dataset with `messages` and the rendered `text` of each row. Raises DataError.

        `raw_rows` may have any shape that lorafit reads.
        """
        records = parse_rows(raw_rows, self.config.field_map)
        for record in records:
            read_by_template = record.tools or record.template_kwargs or record.is_document
            if read_by_template or any(turn.extra or turn.loss is not None for turn in record.turns):
                what = "tools, reasoning, loss flags, template variables and documents do not fit into these columns"
                raise DataError(what, where=record.source, fix="train such rows through lorafit.train")
        texts = [self.template.render(record.messages(), add_generation_prompt=False) for record in records]
        return Dataset.from_dict(
            {
                "messages": [[{"role": m["role"], "content": m["content"]} for m in r.messages()] for r in records],
                "text": texts,
                "source": [record.source for record in records],
            }
        )

    def tokenize_dataset(self, dataset: Dataset, max_length: int = 512, *, on_long: str = "error") -> Dataset:
        """Return input_ids, attention_mask and labels of `messages`.

        Labels are -100 except on responses and their stop token. Rows are never truncated: a row longer than
        `max_length` raises DataError, or is left out with `on_long="drop"` and a warning with the count. Rows are not
        padded, since packing needs no padding.
        """
        if on_long not in ("error", "drop"):
            raise UsageError(f"'{on_long}' is no value of on_long", where="on_long", fix="choose error or drop")
        records = [Record.from_messages(row["messages"], row.get("source", "row")) for row in dataset]
        encoded = self.template.encode_many(records)
        long = [record.source for record, one in zip(records, encoded) if len(one.ids) > max_length]
        if long:
            what = f"{len(long)} rows are longer than {max_length} tokens, such as {', '.join(long[:NAMED_ROWS])}"
            if on_long == "error":
                raise DataError(what, fix="raise max_length, shorten them, or pass on_long='drop'")
            warnings.warn(f"{what}: left out", stacklevel=2)
        kept = [one for one in encoded if len(one.ids) <= max_length]
        return Dataset.from_dict(
            {
                "input_ids": [one.ids for one in kept],
                "attention_mask": [[1] * len(one.ids) for one in kept],
                "labels": [np.where(one.mask, one.ids, IGNORED).tolist() for one in kept],
            }
        )

    def build_trainer(
        self,
        model: Any,
        train_ds: Dataset,
        eval_ds: Dataset | None = None,
        output_dir: str | Path | None = None,
        **settings: Any,
    ) -> LorafitTrainer:
        """Return a transformers Trainer over packed steps; `settings` are keys of RunConfig.

        Checkpoints go to `output_dir`/checkpoints, by default in a temporary folder.
        """
        fixed = {"base", "method", "rank", "alpha", "dropout", "targets", "quantization"} & set(settings)
        if fixed:
            raise UsageError(
                f"{min(fixed)} is fixed when the pipeline is made", where="build_trainer", fix="set it there"
            )
        config = resolve(flags={**self.config.model_dump(exclude_unset=True), **settings}).config
        most = int(model.get_input_embeddings().num_embeddings)
        rows, held_out = _rows(train_ds, most), _rows(eval_ds, most) if eval_ds is not None and len(eval_ds) else None
        longest = max(int(part.lengths.max()) for part in (rows, held_out) if part is not None and len(part))
        if longest > config.max_length:
            config = config.model_copy(update={"max_length": longest})
        folder = Path(output_dir) if output_dir else Path(tempfile.mkdtemp(prefix="lorafit-run-"))
        events = EventLog(folder / "events.jsonl")
        _recompute_if_asked(model, config)
        objective = objective_of(config, VocabularyLoss.expected(model))
        parts = (model, method_of(config), objective, config, rows, held_out)
        return LorafitTrainer(TrainingLoop(*parts, RunContext(folder / "checkpoints", events=events)))


def _recompute_if_asked(model: Any, config: RunConfig) -> None:
    """Make transformers recompute the layers' activations if the memory policy asks for it.

    `lorafit.train` uses the engine's layers instead.
    """
    policy = config.memory_policy
    if policy == "recompute" or (policy == "auto" and torch.cuda.is_available()):
        # transformers renamed it after 5.17; the old name warns in newer releases and is removed in 6
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})


def _rows(dataset: Dataset, ids: int) -> Rows:
    """Return tokenized columns as Rows. Tokens whose label is -100 are not supervised.

    `ids` is the number of token ids of the model. Raises DataError for an empty data set and for other ids.
    """
    if not len(dataset):
        raise DataError("the dataset has no rows", where="build_trainer", fix="pass at least one tokenized row")
    if not {"input_ids", "labels"} <= set(dataset.column_names):
        raise UsageError("the dataset is not tokenized", where="build_trainer", fix="pass it through tokenize_dataset")
    encoded = [Encoded(list(row["input_ids"]), [label != IGNORED for label in row["labels"]], ()) for row in dataset]
    for number, one in enumerate(encoded, 1):
        beyond = [token for token in one.ids if not 0 <= token < ids]
        if beyond:
            what = f"token id {beyond[0]} has no row in the model's {ids:,} embeddings"
            raise DataError(what, where=f"row {number}", fix="tokenize with the base's own tokenizer")
        if one.mask:
            one.mask[0] = False  # no token precedes a row's first token, so none can predict it
        if not any(one.mask):
            raise DataError(
                "no token of this row is supervised", where=f"row {number}", fix="put the responses into labels"
            )
    return Rows.from_encoded(encoded)
