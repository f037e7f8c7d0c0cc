"""InitialAdapter: the trained adapter that a run begins with, and the settings that the run takes from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config import Resolved, RunConfig, read_json
from lorafit.errors import AdapterError, UsageError
from lorafit.runs.run_dir import RunDir
from lorafit.runs.seal import file_hash
from lorafit.runs.trained_run import choose_weights

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
SHAPE_SETTINGS = ("rank", "alpha", "rslora", "dora", "trainable_tokens", "modules_to_save")
"""Settings that a run shares with its initial adapter, beside the targets."""
PEFT_KEYS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "modules_to_save": "modules_to_save",
    "targets": "target_modules",
}


@dataclass(frozen=True)
class InitialAdapter:
    """Hold an adapter that training begins with.

    Attributes:
        folder: the folder of its weights.
        run: the run that trained it; None for a folder of unknown origin.
    """

    folder: Path
    run: RunDir | None

    @classmethod
    def open(cls, name: str) -> InitialAdapter:
        """Return the adapter that the setting `init_adapter` names: a finished run, or an adapter folder.

        Raises UsageError if there is none, RunDirError or AdapterError for a run whose files have changed.
        """
        path = Path(name).expanduser()
        run = next((one for one in (RunDir(path), RunDir(path.parent)) if one.holds_run), None)
        if run is not None and path in (run.path, run.adapter):
            if run.config().method != "lora":
                what = "the run trained every weight, so it has no adapter to begin with"
                raise UsageError(
                    what, where=f"init_adapter {name}", fix="set base to its folder 'model', or train anew"
                )
            return cls(choose_weights(run).folder, run)
        if not all((path / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE)):
            fix = f"name a finished run, or a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            raise UsageError("no adapter is there", where=f"init_adapter {name}", fix=fix)
        return cls(path, None)

    @property
    def content_hash(self) -> str:
        """Return the sha256 of its weights, hex."""
        return file_hash(self.folder / WEIGHTS_FILE)

    def settings(self) -> RunConfig:
        """Return rank, alpha, variant and targets of the adapter. Raises AdapterError for values that are none."""
        if self.run is not None:
            run = self.run.config()
            if run.stored_rank == run.rank:
                return run
            stored = {"rank": run.stored_rank, "alpha": run.scale * run.stored_rank, "rslora": False}
            return run.model_copy(update={**stored, "init_lora_weights": "default"})
        raw = read_json(self.folder / CONFIG_FILE, AdapterError)
        given: dict[str, Any] = {ours: raw[key] for ours, key in PEFT_KEYS.items() if raw.get(key) is not None}
        try:
            if not isinstance(given["targets"], list):
                raise TypeError("a pattern of names, not a list of them")
            # PEFT adapts feed-forwards beside experts as parameters
            beside = [name[:-7] for name in raw.get("target_parameters") or () if name.endswith(".weight")]
            return RunConfig(**{**given, "targets": tuple(sorted({*given["targets"], *beside}))})
        except (AttributeError, KeyError, TypeError, ValueError, UsageError) as error:
            what = "the file does not describe a LoRA adapter on named modules"
            raise AdapterError(what, where=str(self.folder / CONFIG_FILE), fix="name another init_adapter") from error


def with_initial_adapter(resolved: Resolved) -> Resolved:
    """Return `resolved` with rank, alpha, variant and targets of the adapter that it begins with.

    Raises UsageError where a recipe or a flag sets another value.
    """
    config = resolved.config
    assert config.init_adapter is not None
    if config.method != "lora":
        what = f"method is {config.method}, which trains no adapter"
        raise UsageError(what, where="init_adapter", fix="leave it out, or set method: lora")
    if config.init_lora_weights != "default":
        what = f"init_lora_weights is {config.init_lora_weights}, and init_adapter names the weights to begin with"
        raise UsageError(what, where="init_lora_weights", fix="leave one of them out")
    adapter = InitialAdapter.open(config.init_adapter).settings()
    keys = (*SHAPE_SETTINGS, "quantization") if adapter.init_lora_weights == "loftq" else SHAPE_SETTINGS
    for key in keys:
        theirs, ours = getattr(adapter, key), getattr(config, key)
        if resolved.is_set(key) and theirs != ours:
            what = f"the initial adapter has {key} {_plain(theirs)}, and this run {_plain(ours)}"
            raise UsageError(what, where=key, fix=f"leave {', '.join(keys)} out: they are the adapter's")
    return resolved.resuming(adapter, (*keys, "targets"))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()
