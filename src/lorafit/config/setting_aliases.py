"""Setting aliases: names of other tools, translated into lorafit's.

The tools are transformers, PEFT, TRL, Axolotl and LLaMA-Factory. Names of older lorafit releases count as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.errors import UsageError

SETTING_ALIASES = {
    "max_tokens": "max_length",
    "vram": "gpu_memory",
    "long": "on_long",
    "map": "field_map",
    "activations": "memory_policy",
    "model": "base",
    "base_model": "base",
    "model_name": "base",
    "model_id": "base",
    "model_name_or_path": "base",
    "base_model_name_or_path": "base",
    "dataset": "data",
    "dataset_name": "data",
    "data_path": "data",
    "train_file": "data",
    "train_data": "data",
    "output_dir": "out",
    "output": "out",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "val_set_size": "holdout",
    "val_size": "holdout",
    "test_size": "holdout",
    "test_split_size": "holdout",
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "peft_use_rslora": "rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "adapter_name_or_path": "init_adapter",
    "lora_model_dir": "init_adapter",
    "resume_adapter_file": "init_adapter",
    "use_dora": "dora",
    "peft_use_dora": "dora",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "add_tokens": "new_tokens",
    "tokens": "new_tokens",
    "lora_modules_to_save": "modules_to_save",
    "additional_target": "modules_to_save",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "lora_target_modules": "targets",
    "dial": "memory_policy",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup",
    "max_norm": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "optim": "optimizer",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "batch": "examples_per_step",
    "batch_size": "examples_per_step",
    "train_batch_size": "examples_per_step",
    "global_batch_size": "examples_per_step",
    "evaluation_steps": "eval_steps",
    "save_total_limit": "keep_last",
    "random_seed": "seed",
    "random_state": "seed",
}
"""Alias -> setting, for aliases whose values need no translation."""
SWITCHES: dict[str, dict[Any, dict[str, Any]]] = {
    "load_in_4bit": {True: {"quantization": "nf4"}, False: {"quantization": "none"}},
    "load_in_8bit": {False: {}},
    "adapter": {"qlora": {"quantization": "nf4"}, "lora": {}},
    "finetuning_type": {"lora": {}, "full": {"method": "full"}},
    "stage": {"sft": {}},
    "do_train": {True: {}},
    "quantization_bit": {4: {"quantization": "nf4"}},
    "bnb_4bit_quant_type": {"nf4": {"quantization": "nf4"}},
    "bnb_4bit_use_double_quant": {True: {}},
    "bf16": {True: {"compute": "bf16"}, "auto": {"compute": "auto"}, False: {}},
    "fp16": {True: {"compute": "fp16"}, "auto": {"compute": "auto"}, False: {}},
    "fp8": {True: {"compute": "fp8"}, False: {}},
    "torch_compile": {True: {"compile": "on"}, False: {"compile": "off"}, "auto": {"compile": "auto"}},
    "lora_target_linear": {True: {"targets": "all-linear"}, False: {}},
    "lora_target": {"all": {"targets": "all-linear"}},
    "warmup_steps": {0: {"warmup": 0.0}},
    "num_warmup_steps": {0: {"warmup": 0.0}},
    "evals_per_epoch": {1: {}},
    "saves_per_epoch": {1: {}},
    "eval_strategy": {"epoch": {}, "steps": {}},
    "evaluation_strategy": {"epoch": {}, "steps": {}},
    "save_strategy": {"epoch": {}, "steps": {}},
    "sample_packing": {True: {}},
    "eval_sample_packing": {True: {}},
    "packing": {True: {}},
    "neat_packing": {True: {}},
    "train_on_inputs": {False: {}},
    "bias": {"none": {}},
    "pissa_init": {True: {"init_lora_weights": "pissa"}, False: {}},
    "pissa_convert": {True: {}, False: {}},
    "task_type": {"CAUSAL_LM": {}},
    "use_wandb": {True: {"report_to": ("wandb",)}, False: {}},
    "use_tensorboard": {True: {"report_to": ("tensorboard",)}, False: {}},
    "use_mlflow": {True: {"report_to": ("mlflow",)}, False: {}},
    "resize_vocab": {True: {}, False: {}},
    "push_to_hub": {False: {}},
    "strict": {False: {}},
    "tf32": {False: {}},
    "resume_from_checkpoint": {False: {}},
    "auto_resume_from_checkpoints": {True: {}, False: {}},
    "overwrite_output_dir": {False: {}},
    "group_by_length": {False: {}},
}
"""Alias -> value with an exact counterpart -> settings. {} means that lorafit does the same by default."""
VALUES: dict[str, dict[Any, Any]] = {
    "optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
    },
    "schedule": {"constant_with_warmup": "constant"},
    "report_to": {"none": (), "None": ()},
}
"""Setting -> value of another tool -> lorafit's value."""
ATTENTION = "leave it out: lorafit chooses attention itself"
PACKED = "leave it out: rows are packed, and never attend to each other"
OWN_TEMPLATE = "write template: FILE for a Jinja file of your own; without it the base's own chat template is used"
MACHINE = "leave it out: lorafit chooses it for the machine"
ONE_GPU = "leave it out: write gpus, or start lorafit with torchrun"
ANSWERS_ONLY = "leave it out: the loss covers only the answers"
EVERY_STEP = "leave it out: every step is written to metrics.jsonl"
FIXED_ADAM = "leave it out: AdamW's betas and epsilon are fixed"
NO_VARIANT = "leave it out: lorafit trains LoRA, with rslora, dora or loraplus_lr_ratio"
TOKENS = "write trainable_tokens: the texts of the tokens whose rows train; modules_to_save trains all rows"
NEW_TOKENS = "write new_tokens for tokens that the base lacks, trainable_tokens for those that it has"
QUANTIZE = "write quantization: nf4, or quantization: none"
ONCE_AN_EPOCH = "write it as steps: eval_steps or save_steps; leave both out for once an epoch"
ADVICE = {
    **dict.fromkeys(("load_in_8bit", "quantization_bit", "bnb_4bit_quant_type", "quantization_method"), QUANTIZE),
    **dict.fromkeys(("flash_attention", "flash_attn", "attn_implementation", "xformers_attention"), ATTENTION),
    **dict.fromkeys(("sdp_attention", "s2_attention", "use_liger_kernel", "enable_liger_kernel"), ATTENTION),
    **dict.fromkeys(("sample_packing", "eval_sample_packing", "packing", "neat_packing", "group_by_length"), PACKED),
    **dict.fromkeys(("pad_to_sequence_len", "padding_side", "pad_token", "excess_length_strategy"), PACKED),
    **dict.fromkeys(("chat_template", "prompt_style", "special_tokens"), OWN_TEMPLATE),
    **dict.fromkeys(("model_type", "tokenizer_type", "is_llama_derived_model", "tokenizer"), OWN_TEMPLATE),
    **dict.fromkeys(("dataloader_num_workers", "preprocessing_num_workers", "dataset_processes"), MACHINE),
    **dict.fromkeys(("tf32", "bnb_4bit_compute_dtype", "dtype", "torch_dtype", "eval_batch_size"), MACHINE),
    **dict.fromkeys(("per_device_eval_batch_size", "dataset_prepared_path", "device_map", "overwrite_cache"), MACHINE),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "local_rank", "ddp_timeout", "num_processes"), ONE_GPU),
    **dict.fromkeys(("train_on_inputs", "train_on_responses_only", "mask_history", "roles_to_train"), ANSWERS_ONLY),
    **dict.fromkeys(("logging_steps", "logging_strategy", "plot_loss", "logging_dir"), EVERY_STEP),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "beta1", "beta2"), FIXED_ADAM),
    **dict.fromkeys(("neftune_noise_alpha", "bias"), NO_VARIANT),
    **dict.fromkeys(("loftq_config", "use_loftq"), "write init_lora_weights: loftq"),
    "trainable_token_indices": TOKENS,
    **dict.fromkeys(("add_special_tokens", "new_special_tokens"), NEW_TOKENS),
    "resize_vocab": "leave it out: new_tokens adds the rows that it needs",
    "pissa_iter": "leave it out: the randomized SVD has 8 iterations",
    **dict.fromkeys(("evals_per_epoch", "saves_per_epoch", "eval_strategy", "evaluation_strategy"), ONCE_AN_EPOCH),
    **dict.fromkeys(("save_strategy", "load_best_model_at_end", "metric_for_best_model"), ONCE_AN_EPOCH),
    "gradient_accumulation_steps": "write examples_per_step: its product with the batch of one device",
    "warmup_steps": "write warmup: the share of all steps, such as 0.05",
    "num_warmup_steps": "write warmup: the share of all steps, such as 0.05",
    "datasets": "write data: the files, such as [rows.jsonl]",
    "adapter": "leave it out, or write quantization: nf4 for QLoRA and none for LoRA",
    "finetuning_type": "write method: lora or full",
    "stage": "leave it out: lorafit trains on instruction rows (sft)",
    "wandb_project": "write report_to: wandb, and set WANDB_PROJECT in the environment",
    "wandb_entity": "write report_to: wandb, and set WANDB_ENTITY in the environment",
    "resume_from_checkpoint": "leave it out: the same command resumes the run",
    "overwrite_output_dir": "leave it out, and add --restart to start over",
    "hub_model_id": "leave it out: lorafit writes folders and uploads nothing",
    "push_to_hub": "leave it out: lorafit writes folders and uploads nothing",
    "gradient_checkpointing_kwargs": "leave it out: recompute is never reentrant",
    "lora_target": "write targets: qv, attention, all-linear, or module names",
    "early_stopping_patience": "leave it out: keep_best keeps the best checkpoint",
    "dataset_dir": "write the folder into data: folder/rows.jsonl",
    "max_samples": "leave it out, and pass a file with fewer rows",
    "output_size": "write out: the run directory",
    "dense": "write memory_policy: dequantized_layers=N",
    "offload": "write memory_policy: offload",
    "restart": "pass --restart to lorafit train",
}
"""Alias without an exact counterpart -> advice on what to write instead."""
CHECKPOINTING = ("gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing")
POLICIES = {
    **dict.fromkeys((True, "on", "true", "reentrant", "unsloth"), "recompute"),
    **dict.fromkeys((False, "off", "false"), "keep"),
    "auto": "auto",
}
DEVICE_BATCH = ("per_device_train_batch_size", "micro_batch_size", "per_device_batch_size")
ACCUMULATION = "gradient_accumulation_steps"
DATASET_KEYS = {"path", "type", "ds_type"}
CODE = "trust_remote_code"
NO_CODE = "leave it out, and choose a base that transformers supports itself"
CONFLICT = "it is set to"
"""Start of the advice for two names that set one setting to different values."""


@dataclass
class Translated:
    """Hold settings under lorafit's names.

    Attributes:
        values: Setting -> value.
        names: Setting -> the alias that set it, for settings set by an alias.
        problems: Name that cannot be translated -> advice.
    """

    values: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def put(self, ours: str, value: Any, theirs: str) -> None:
        """Set `ours`, or note a problem when another name has set it to another value."""
        if ours in self.values and self.values[ours] != value:
            first = self.names.get(ours, ours)
            self.problems[theirs] = f"{CONFLICT} {value}, and {first} to {self.values[ours]}; set it once"
            return
        self.values[ours] = value
        if ours != theirs:
            self.names[ours] = theirs


def translate(given: Mapping[str, Any], known: Collection[str]) -> Translated:
    """Return `given` under the names in `known`.

    Names that are neither known nor aliases are problems.
    """
    made = Translated()
    rest: dict[str, tuple[str, Any]] = {}
    for key, value in given.items():
        if key in known:
            made.put(key, _value(key, value), key)
        else:
            rest[key.lower().replace("-", "_")] = (key, value)
    _translate_batch(rest, made)
    _translate_checkpointing(rest, made)
    for plain, (key, value) in rest.items():
        _translate_one(plain, key, value, made, known)
    return made


def our_name(key: str, known: Collection[str]) -> str:
    """Return the setting that `key` names, or `key` itself for an unknown name."""
    plain = key.lower().replace("-", "_")
    if key in known or plain in known:
        return key if key in known else plain
    if plain in CHECKPOINTING:
        return "memory_policy"
    if plain == "datasets":
        return "data"
    switched = {ours for made in SWITCHES.get(plain, {}).values() for ours in made}
    return switched.pop() if len(switched) == 1 else SETTING_ALIASES.get(plain, key)


def aliases_of(setting: str) -> tuple[str, ...]:
    """Return every alias of `setting`."""
    switches = [name for name, values in SWITCHES.items() if any(setting in made for made in values.values())]
    more = CHECKPOINTING if setting == "memory_policy" else DEVICE_BATCH if setting == "examples_per_step" else ()
    return (*(theirs for theirs, ours in SETTING_ALIASES.items() if ours == setting), *switches, *more)


def advice_for(key: str, known: Collection[str]) -> str:
    """Return the advice on what to write instead of the unknown setting `key`."""
    plain = key.lower().replace("-", "_")
    if plain in ADVICE:
        return ADVICE[plain]
    # 'learningrate' means 'learning_rate'
    squeezed = {name.replace("_", ""): name for name in (*SETTING_ALIASES, *known)}
    exact = squeezed.get(plain.replace("_", ""))
    near = [exact] if exact else difflib.get_close_matches(plain, [*known, *SETTING_ALIASES], n=1, cutoff=0.7)
    if not near:
        return "see all settings with 'lorafit settings'"
    return f"did you mean '{SETTING_ALIASES.get(near[0], near[0])}'?"


def _value(ours: str, value: Any) -> Any:
    spelled = VALUES.get(ours, {})
    return spelled.get(value, value) if isinstance(value, str) else value


def _translate_one(plain: str, key: str, value: Any, made: Translated, known: Collection[str]) -> None:
    ours = plain if plain in known else SETTING_ALIASES.get(plain)
    if plain == CODE:
        made.problems[key] = NO_CODE
    elif value is None and (ours or plain in SWITCHES or plain in ADVICE):
        return  # recipes of other tools leave keys blank
    elif ours:
        made.put(ours, _value(ours, value), key)
    elif plain in SWITCHES:
        _translate_switch(plain, key, value, made)
    elif plain == "datasets" and (paths := _dataset_paths(value)):
        made.put("data", paths, key)
    else:
        made.problems[key] = advice_for(key, known)


def _translate_switch(plain: str, key: str, value: Any, made: Translated) -> None:
    if isinstance(value, dict | list | tuple):
        settings = None
    else:
        settings = next((one for at, one in SWITCHES[plain].items() if at == value and type(at) is type(value)), None)
    if plain == "lora_target" and settings is None:
        settings = {"targets": value}
    if settings is None:
        made.problems[key] = ADVICE.get(plain, f"write {' or '.join(_written(plain))}")
        return
    for ours, one in settings.items():
        made.put(ours, one, key)


def _written(switch: str) -> list[str]:
    return sorted({f"{key}: {value}" for made in SWITCHES[switch].values() for key, value in made.items()})


def _translate_batch(rest: dict[str, tuple[str, Any]], made: Translated) -> None:
    """Set examples_per_step to the device's batch times its accumulation: lorafit uses one GPU."""
    named = next((name for name in DEVICE_BATCH if name in rest), None)
    if named is None:
        return
    key, batch = rest.pop(named)
    other, times = rest.pop(ACCUMULATION, (ACCUMULATION, 1))
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (batch, times))
    if not whole:
        made.problems[key] = "write examples_per_step: the examples of one optimizer step"
        return
    made.put("examples_per_step", batch * times, f"{key} × {other}" if times != 1 else key)


def _translate_checkpointing(rest: dict[str, tuple[str, Any]], made: Translated) -> None:
    """Translate gradient checkpointing into a memory policy. A policy that is set too must agree with it."""
    for name in CHECKPOINTING:
        if name not in rest:
            continue
        key, value = rest.pop(name)
        implied = POLICIES.get(value.lower() if isinstance(value, str) else value)
        policy = made.values.get("memory_policy", rest.get("activations", ("", "auto"))[1])
        if implied is None:
            made.problems[key] = "write memory_policy: recompute, keep or auto"
        elif implied != "auto" and policy in ("auto", None):
            made.values.pop("memory_policy", None)
            rest.pop("activations", None)
            made.put("memory_policy", implied, key)
        elif implied != "auto" and not _agrees(str(policy), implied):
            made.problems[key] = f"{CONFLICT} {implied}, and memory_policy to {policy}; leave it out"


def _agrees(text: str, implied: str) -> bool:
    try:
        policy = MemoryPolicy.parse(text, layers=1 << 20)
    except UsageError:
        return True  # RunConfig reports an invalid policy
    return not policy.recompute_mlp_layers and (policy.recompute_layers > 0) == (implied == "recompute")


def _dataset_paths(value: Any) -> list[str] | None:
    """Return the files of Axolotl's `datasets`; None when an entry holds more than a file.

    Other keys of an entry would be lost.
    """
    shapes: tuple[Callable[[dict[str, Any]], bool], ...] = (
        lambda one: set(one) <= DATASET_KEYS,
        lambda one: isinstance(one.get("path"), str),
        lambda one: str(one.get("type", "alpaca")).partition(".")[0] in ("alpaca", "chat_template", "sharegpt"),
    )
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return None
    return [one["path"] for one in value] if all(fits(one) for one in value for fits in shapes) else None
