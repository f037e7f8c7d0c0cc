"""RunFingerprint: hashes of a run's data and base, and its settings. No torch.

A run resumes only when its fingerprint is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.config.run_config import RunConfig
from lorafit.errors import RunDirError
from lorafit.runs.seal import is_sealed, sealed

PROCESSES = "the number of processes"
"""Key in a run's environment. A run that began as one process has none."""
LAYOUT = ("max_length", "memory_policy", "compile", "deterministic")
"""Settings of layout and speed. They change no step's examples, and results only in their last bits."""
FREE = frozenset(
    (
        # the fingerprint holds hashes of the base, the rows, the template and the initial adapter: places may change
        "base", "revision", "data", "encoding", "template", "split_answers", "field_map", "on_bad",
        "init_adapter", "on_long", "holdout", "out", "max_unpacked",
        # display, checkpoints, plan and trackers
        "select", "ignore", "goal", "serving", "gpu", "gpus", "gpu_memory", "report_to", "eval_steps", "save_steps",
        "save_minutes", "keep_last", "keep_best", "max_bad_steps",
        *LAYOUT,
    )
)  # fmt: skip
"""Settings that may change when a run resumes. All others, new ones included, must stay."""
FORMAT = 2
"""Format of fingerprint.json. The first had no seal, and neither `format` nor `files`."""
UNSEALED_KEYS = {"run", "fingerprint", "environment", "adapter"}
DAMAGED = "restore the file from a copy of the run, or pass --restart, which moves the old run to another folder"


@dataclass(frozen=True)
class RunFingerprint:
    """Hold the inputs that determine a run; hashes are sha256, hex.

    Attributes:
        train_rows: Hash of the training rows.
        held_out_rows: Hash of the held-out rows.
        template: Hash of the chat template.
        base: Hash of the base.
        settings: Every setting that is not in FREE.
        init_adapter: Hash of the adapter that training begins with; empty without one.
    """

    train_rows: str
    held_out_rows: str
    template: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    init_adapter: str = ""

    def differences(self, now: RunFingerprint) -> list[tuple[str, str, str]]:
        """Return (name, then, now) of everything that differs, the most informative first."""
        names = {"base": "the base", "init_adapter": "the initial adapter", "template": "the chat template"}
        names["train_rows"] = "the training rows"
        found = [
            (words, _short(getattr(self, name)), _short(getattr(now, name)))
            for name, words in {**names, "held_out_rows": "the held-out rows"}.items()
            if getattr(self, name) != getattr(now, name)
        ]
        return differing_settings(with_defaults(self.settings, now.settings), now.settings) + found

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunFingerprint:
        """Return the fingerprint that `to_dict` wrote. Raises TypeError for any other mapping."""
        made = cls(**fields)
        hashes = (made.train_rows, made.held_out_rows, made.template, made.base, made.init_adapter)
        if not _are_texts(hashes) or not isinstance(made.settings, Mapping):
            raise TypeError("no fingerprint")
        return made


@dataclass(frozen=True)
class RunIdentity:
    """Hold the content of `fingerprint.json`, the sealed manifest of a run.

    Attributes:
        run: Id of the run, which its checkpoints repeat.
        fingerprint: What determines the run.
        environment: Versions, device and threads at its start. Another environment may change the last bits.
        adapter: File name -> sha256 of the trained adapter; empty before the run ends.
        files: File name -> sha256 of the run's files that `chat` and `merge` read.
        is_sealed: Whether the file carries its own hash. Files of older releases do not.
    """

    run: str
    fingerprint: RunFingerprint
    environment: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    is_sealed: bool = True

    @classmethod
    def read(cls, path: Path) -> RunIdentity:
        """Return the identity in the file at `path`. Raises RunDirError for a missing, damaged or edited file."""
        try:
            return cls._from_dict(read_json(path, RunDirError), path)
        except (ValueError, KeyError, TypeError, RunDirError) as error:
            if isinstance(error, RunDirError) and error.fix == DAMAGED:
                raise
            what = "the run's fingerprint cannot be read, so nothing shows what the run was trained from"
            raise RunDirError(what, where=str(path), fix=DAMAGED) from error

    @classmethod
    def _from_dict(cls, saved: Mapping[str, Any], path: Path) -> RunIdentity:
        has_seal = not set(saved) <= UNSEALED_KEYS
        if has_seal and not is_sealed(saved):
            what = "the run's fingerprint has changed since it was written (its SHA-256 differs)"
            raise RunDirError(what, where=str(path), fix=DAMAGED)
        if has_seal and saved["format"] != FORMAT:
            what = f"the run's fingerprint has format {saved['format']!s:.20}, and this release reads {FORMAT}"
            raise RunDirError(what, where=str(path), fix=DAMAGED)
        adapter, files = dict(saved.get("adapter", {})), dict(saved["files"]) if has_seal else {}
        if not _are_texts((saved["run"], *adapter.values(), *files.values())):
            raise TypeError("no identity")
        fingerprint = RunFingerprint.from_dict(saved["fingerprint"])
        return cls(saved["run"], fingerprint, dict(saved["environment"]), adapter, files, has_seal)

    @property
    def processes(self) -> int:
        """Number of processes with which the run began."""
        return int(self.environment.get(PROCESSES, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping with its seal."""
        content = {
            "format": FORMAT,
            "run": self.run,
            "fingerprint": self.fingerprint.to_dict(),
            "environment": dict(self.environment),
            "files": dict(self.files),
            "adapter": dict(self.adapter),
        }
        return sealed(json.loads(json.dumps(content)))

    def with_files(self, files: Mapping[str, str]) -> RunIdentity:
        """Return the identity with the hashes of the run's files (name -> sha256), sealed when it is written."""
        return replace(self, files=dict(files), is_sealed=True)

    def ended_in(self, adapter: Mapping[str, str]) -> RunIdentity:
        """Return the identity with the hashes of the trained adapter (file name -> sha256)."""
        return replace(self, adapter=dict(adapter))


def held_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that must not change when a run resumes, as JSON values."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}


def with_defaults(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return `then` with the default of every setting in `now` that the release which wrote `then` did not know."""
    unknown = [key for key in now if key not in then and key in RunConfig.model_fields]
    return {**RunConfig().model_dump(mode="json", include=set(unknown)), **then}


def differing_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (key, then, now) of the settings that differ.

    A key that one side lacks counts as not set there: another release may not know it.
    """
    keys = dict.fromkeys([*then, *now])
    return [
        (key, str(then.get(key, "not set")), str(now.get(key, "not set")))
        for key in keys
        if then.get(key, "not set") != now.get(key, "not set")
    ]


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _short(digest: str) -> str:
    return f"sha256 {digest[:12]}" if len(digest) == 64 else digest
