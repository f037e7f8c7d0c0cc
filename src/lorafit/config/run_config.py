"""RunConfig: every setting of a run, frozen. The defaults are the author's QLoRA recipe."""

from __future__ import annotations

import codecs
import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lorafit.config.foreign_text import parse_bytes
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.config.setting_aliases import SETTING_ALIASES, translate
from lorafit.errors import UsageError
from lorafit.findings import is_code_prefix

MAX_RANK = 1024
"""Largest rank of an adapter that lorafit writes or reads."""
MAX_SCALE = 1024.0
"""Largest alpha / rank. lorafit neither writes nor reads an adapter with a larger one."""
OTHER_MAKERS = re.compile(
    r"\b(?:apple|m[1-9](?: ?(?:pro|max|ultra))?|amd|radeon|rx ?\d{3,4}\w*|mi\d{2,3}\w*|instinct|"
    r"intel|arc|gaudi ?\d?|tpu\w*|ascend\w*|adreno)\b",
    re.IGNORECASE,
)
"""GPUs that torch's CUDA does not run on."""
UNREADABLE = re.compile("[\\0\ud800-\udfff]")
"""Characters of a path that not every library opens: a NUL, and what Python makes of bytes that are not UTF-8."""
Goal = Literal["balanced", "budget", "accuracy", "latency", "tenants"]
TargetPreset = Literal["qv", "attention", "all-linear", "all-linear+experts"]
PRESETS: tuple[str, ...] = get_args(TargetPreset)
EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The modules that `modules_to_save` may name, whatever the base calls them."""
WHOLE_MODULES = {
    **dict.fromkeys((EMBEDDING, "wte", "embed_in", "word_embeddings", "tok_embeddings"), EMBEDDING),
    **dict.fromkeys((HEAD, "embed_out", "output_layer"), HEAD),
}
"""Name of a module in some family -> EMBEDDING or HEAD."""


def scale_divisor(rank: int, *, rslora: bool) -> float:
    """Return the divisor of alpha: the rank, or its root in rank-stabilized LoRA (Kalajdzievski, 2023)."""
    return math.sqrt(rank) if rslora else float(rank)


class RunConfig(BaseModel):
    """Hold every setting of one run.

    The object is passed on as a whole, and its fields are not copied elsewhere. `PLANNED` lists the settings that the
    plan decides when neither the recipe nor a flag sets them. Their defaults apply in the Python API, which makes no
    plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # base and data
    base: str = Field("", description="base model: a local folder, or a hub id")
    revision: str | None = Field(None, description="hub revision of the base")
    data: tuple[str, ...] = Field((), description="data files, globs, a folder, or a hub dataset id")
    out: str | None = Field(None, description="run directory; default runs/NAME")

    # rows and findings
    field_map: dict[str, str] = Field(default_factory=dict, description="field names, as response=answer_text")
    encoding: str | None = Field(None, description="how text files are written, as cp1252; default UTF-8 and UTF-16")
    template: str | None = Field(None, description="chat template file (Jinja); default the base's own")
    on_bad: Literal["stop", "drop"] = Field("stop", description="unreadable rows: stop the run, or drop them")
    on_long: Literal["error", "drop", "split-turns"] = Field("error", description="rows longer than max_length")
    split_answers: bool = Field(False, description="each answer is its own example, after the turns before it")
    holdout: Annotated[float, Field(ge=0, lt=1)] | str = Field(
        0.05, description="held-out share of the rows, or a file of held-out rows"
    )
    select: tuple[str, ...] = Field((), description="warnings and notes to show, by code prefix; empty means all")
    ignore: tuple[str, ...] = Field((), description="findings to hide: warnings by code prefix, errors by whole code")
    max_length: int = Field(2048, ge=8, description="longest row in tokens; on a CPU also the largest micro-batch")
    max_unpacked: str = Field("64GiB", description="most that a packed data file may unpack to")

    # the method
    method: Literal["lora", "full"] = Field(
        "lora", description="training method: lora, low-rank adapters on a frozen base; or full, every weight"
    )
    objective: str = Field(
        "sft", description="the loss: sft, cross entropy over supervised tokens; or the name of a plug-in"
    )
    goal: Goal = Field("balanced", description="aim of the decision matrix")
    serving: Literal["auto", "merged", "adapters"] = Field("auto", description="how the result is served")
    quantization: Literal["nf4", "none"] = Field("nf4", description="the frozen base: nf4 (double quantized) or none")
    compute: Literal["auto", "bf16", "fp16", "fp32", "fp8"] = Field(
        "auto", description="matmul precision; auto depends on the GPU, fp8 is for the decoder's matmuls"
    )
    init_adapter: str | None = Field(None, description="adapter to go on from: a finished run, or an adapter folder")
    rank: int = Field(16, ge=1, le=MAX_RANK, description="LoRA rank r")
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False, description="LoRA alpha; the delta is scaled by alpha / rank")
    rslora: bool = Field(False, description="rank-stabilized LoRA: the delta is scaled by alpha / √rank")
    dora: bool = Field(False, description="DoRA: the length of each weight row trains too, apart from its direction")
    init_lora_weights: Literal["default", "pissa", "olora", "loftq"] = Field(
        "default",
        description="what adapters begin with: default, A at random and B zero; pissa or olora, a part of the weight; "
        "loftq, what quantizing lost",
    )
    trainable_tokens: tuple[str, ...] = Field(
        (), description="tokens whose rows of embedding and head train too, as <|im_start|>"
    )
    new_tokens: tuple[str, ...] = Field(
        (), description="tokens that the base lacks; they are added to it and their rows train, as <tool>"
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="modules that train whole beside the adapters: embed_tokens, lm_head, or both"
    )
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="LoRA+: learning rate of B as a multiple of lr, which A has",
    )
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the LoRA input")
    targets: TargetPreset | tuple[str, ...] = Field(
        "qv", description="qv, attention, all-linear, all-linear+experts, or module names"
    )
    memory_policy: str = Field("auto", description="keep, recompute, offload, or counts; auto fits the memory")
    compile: Literal["auto", "on", "off"] = Field("auto", description="compile the decoder layer; auto: on CUDA")

    # the optimization
    lr: float = Field(2e-4, gt=0, allow_inf_nan=False, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after warm-up")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in warm-up")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="gradient norm clip")
    optimizer: Literal["auto", "adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "auto", description="AdamW and the precision of its moments; auto depends on the GPU"
    )
    epochs: float = Field(3.0, gt=0, le=10_000, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="most optimizer steps; overrides epochs")
    examples_per_step: int = Field(16, ge=1, description="examples in one optimizer step")
    eval_steps: int | None = Field(None, ge=1, description="steps between evaluations; default: one epoch")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; default: one epoch")
    save_minutes: float = Field(
        15.0, ge=0, allow_inf_nan=False, description="most minutes between two checkpoints; 0: no limit"
    )
    max_bad_steps: int = Field(3, ge=1, description="consecutive steps with NaN or infinite values that stop the run")
    on_spike: Literal["record", "rollback"] = Field(
        "record", description="a loss spike: record it, or resume from the last checkpoint without its rows"
    )
    keep_last: int = Field(2, ge=1, description="newest checkpoints to keep")
    keep_best: int = Field(1, ge=0, description="older checkpoints to keep by held-out loss")
    deterministic: bool = Field(False, description="bit-identical runs on CUDA, somewhat slower; CPU runs always are")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of all randomness")

    # the machine
    gpu: str | None = Field(None, description="plan for this GPU instead of the detected one")
    gpus: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        None, description="GPUs of this machine to train on, a number or all; default: by the plan"
    )
    gpu_memory: str | None = Field(None, description="most GPU memory to use, as 8GB")
    shard_base: Literal["auto", "on", "off"] = Field(
        "auto", description="share the frozen base's layers among the GPUs; auto: if it does not fit each"
    )
    report_to: tuple[str, ...] = Field((), description="trackers of transformers: tensorboard, wandb, mlflow, …")

    @model_validator(mode="before")
    @classmethod
    def _by_our_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        translated = translate(given, cls.model_fields)
        for key, advice in translated.problems.items():
            raise UsageError(f"unknown setting '{key}'", fix=advice)
        return _with_defaults_of_method(translated.values)

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("base", "out", "init_adapter")
    @classmethod
    def _is_text(cls, value: str | None, info: ValidationInfo) -> str | None:
        if UNREADABLE.search(value or ""):  # safetensors and tokenizers open no such path
            what = f"{value!r:.80} holds a NUL or bytes that are not UTF-8"
            raise UsageError(what, where=info.field_name, fix="give the folder another name")
        return value

    @field_validator(
        "select", "ignore", "report_to", "trainable_tokens", "new_tokens", "modules_to_save", mode="before"
    )
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("modules_to_save")
    @classmethod
    def _are_embedding_and_head(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        kinds = {WHOLE_MODULES.get(name.rpartition(".")[2], name) for name in value}
        if odd := sorted(kinds - {EMBEDDING, HEAD}):
            what = f"'{odd[0]:.40}' does not train whole beside adapters; embedding and head do"
            fix = f"write modules_to_save: [{EMBEDDING}, {HEAD}], or method: full to train every weight"
            raise UsageError(what, where="modules_to_save", fix=fix)
        return tuple(name for name in (EMBEDDING, HEAD) if name in kinds)

    @field_validator("report_to")
    @classmethod
    def _none_is_no_tracker(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in value if name != "none")

    @field_validator("holdout", mode="before")
    @classmethod
    def _reads_per_cent(cls, value: Any) -> Any:
        share = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*", value) if isinstance(value, str) else None
        return float(share[1]) / 100 if share else value

    @field_validator("select", "ignore")
    @classmethod
    def _are_codes(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for code in value:
            if not is_code_prefix(code):
                fix = "write D01 or D044, several with commas between; lorafit explain lists all"
                raise UsageError(f"no finding's code starts with '{code:.20}'", where=info.field_name or "", fix=fix)
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _names_or_preset(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in PRESETS:
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator(
        "max_length", "rank", "alpha", "loraplus_lr_ratio", "dropout", "lr", "warmup", "weight_decay", "max_grad_norm",
        "epochs", "seed", "max_steps", "examples_per_step", "eval_steps", "save_steps", "save_minutes", "max_bad_steps",
        "keep_last", "keep_best",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _yes_is_no_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("it should be a number, not yes or no")
        return value

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _as_peft_writes_it(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"pissa_niter_\d+", value):
            return "pissa"
        return "default" if value is True or value == "true" else value

    @field_validator("compile", "shard_base", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("memory_policy")
    @classmethod
    def _is_a_policy(cls, value: str) -> str:
        if value != "auto":
            MemoryPolicy.parse(value, layers=1)
        return value

    @property
    def scale(self) -> float:
        """Return the factor of the product of an adapter's matrices."""
        return self.alpha / scale_divisor(self.rank, rslora=self.rslora)

    def total_steps(self, epoch_steps: int) -> int:
        """Return the optimizer steps of a run whose epochs have `epoch_steps`, at most `max_steps`."""
        steps = math.ceil(self.epochs * epoch_steps)
        return min(steps, self.max_steps) if self.max_steps else steps

    @property
    def stored_rank(self) -> int:
        """Return the rank of the adapter in files: twice the rank where it began as a part of its weight."""
        return self.rank * (2 if self.init_lora_weights in ("pissa", "olora") else 1)

    @model_validator(mode="after")
    def _initialization_is_possible(self) -> RunConfig:
        init, where = self.init_lora_weights, "init_lora_weights"
        if init == "default" or self.method == "full":
            return self
        if self.dora:
            what = f"{where} is {init}, and dora is true: DoRA begins with the weight's own directions"
            raise UsageError(what, where=where, fix="leave one of them out")
        if init == "loftq" and self.quantization != "nf4":
            what = f"{where} is loftq, which begins with what quantizing lost, and quantization is {self.quantization}"
            raise UsageError(what, where=where, fix=f"set quantization: nf4, or {where}: pissa")
        if self.stored_rank > MAX_RANK:
            what = f"{where} is {init}, which is stored with twice the rank, and adapters load with at most {MAX_RANK}"
            raise UsageError(what, where="rank", fix=f"set rank to {MAX_RANK // 2} or less")
        return self

    @model_validator(mode="after")
    def _tokens_train_once(self) -> RunConfig:
        if not self.modules_to_save or self.method == "full":
            return self
        if self.trainable_tokens:
            what = "modules_to_save trains every row of a module, and trainable_tokens rows of some tokens"
            raise UsageError(what, where="trainable_tokens", fix="leave one of them out")
        if self.new_tokens and len(self.modules_to_save) == 1:
            what = f"new tokens need rows in both embedding and head, and only {self.modules_to_save[0]} trains whole"
            fix = f"write modules_to_save: [{EMBEDDING}, {HEAD}], or leave it out"
            raise UsageError(what, where="modules_to_save", fix=fix)
        return self

    @model_validator(mode="after")
    def _scale_can_be_loaded(self) -> RunConfig:
        if self.scale > MAX_SCALE:
            divisor = scale_divisor(self.rank, rslora=self.rslora)
            raise UsageError(
                f"alpha / {'√rank' if self.rslora else 'rank'} is {self.scale:g}, and adapters load with at most "
                f"{MAX_SCALE:g}",
                where="alpha",
                fix=f"set alpha to {MAX_SCALE * divisor:g} or less ({2 * divisor:g} is usual)",
            )
        return self

    @model_validator(mode="after")
    def _trained_weights_are_not_quantized(self) -> RunConfig:
        if self.method == "full" and self.quantization != "none":
            freezes = f"quantization is {self.quantization}, which freezes them"
            what = f"method is full, which trains every weight, and {freezes}"
            raise UsageError(what, where="quantization", fix="set quantization: none, or method: lora")
        return self

    @field_validator("encoding")
    @classmethod
    def _is_an_encoding(cls, value: str | None) -> str | None:
        try:
            return codecs.lookup(value).name if value else None
        except LookupError:
            fix = "write cp1252, latin-1, shift_jis, gb18030 or another that Python knows"
            raise UsageError(f"'{value:.30}' is no encoding", where="encoding", fix=fix) from None

    @field_validator("gpu")
    @classmethod
    def _is_of_nvidia(cls, value: str | None) -> str | None:
        if value is not None and OTHER_MAKERS.search(value):
            fix = "name an NVIDIA GPU, or plan for the CPU with gpu: cpu"
            raise UsageError(f"'{value:.40}' is not an NVIDIA GPU, which lorafit needs", where="gpu", fix=fix)
        return value

    @field_validator("gpu_memory", "max_unpacked")
    @classmethod
    def _is_a_size(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            parse_bytes(value, info.field_name or "")
        return value


METHOD_DEFAULTS: dict[str, dict[str, Any]] = {"full": {"quantization": "none", "lr": 2e-5}}
"""Defaults that a method changes. A full run's peak learning rate is a tenth of LoRA's: every weight moves."""


def _with_defaults_of_method(values: dict[str, Any]) -> dict[str, Any]:
    method = values.get("method")
    return {**(METHOD_DEFAULTS.get(method, {}) if isinstance(method, str) else {}), **values}


PLANNED = (
    "method", "rank", "alpha", "quantization", "compute", "compile", "lr", "optimizer", "memory_policy", "serving",
    "shard_base",
)  # fmt: skip
"""Settings that the plan decides when neither recipe nor flag sets them."""
_TEXTS = frozenset(
    key
    for key, field in RunConfig.model_fields.items()
    if field.annotation in (str, str | None, tuple[str, ...], dict[str, str])
)
TEXTS = _TEXTS | {theirs for theirs, ours in SETTING_ALIASES.items() if ours in _TEXTS}
"""Settings that are text, by each of their names. Their values are never read as numbers or booleans."""
