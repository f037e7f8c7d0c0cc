"""RunFingerprint: hashes of a run's data and base, and its settings. No torch.

A run resumes only when its fingerprint is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.config.run_config import RunConfig
from lorafit.errors import RunDirError

LAYOUT = ("max_length", "memory_policy", "compile", "deterministic")
"""Settings of layout and speed. They change no step's examples, and results only in their last bits."""
FREE = frozenset(
    (
        # the fingerprint holds hashes of the base, the rows and the template, so their places may change
        "base", "revision", "data", "encoding", "template", "split_answers", "field_map", "on_bad",
        "on_long", "holdout", "out", "max_unpacked",
        # display, checkpoints, plan and trackers
        "select", "ignore", "goal", "serving", "gpu", "gpu_memory", "report_to", "eval_steps", "save_steps",
        "save_minutes", "keep_last", "keep_best", "max_bad_steps",
        *LAYOUT,
    )
)  # fmt: skip
"""Settings that may change when a run resumes. All others, new ones included, must stay."""


@dataclass(frozen=True)
class RunFingerprint:
    """Hold what determines a run; hashes are sha256, hex.

    Attributes:
        train_rows: Hash of the training rows.
        held_out_rows: Hash of the held-out rows.
        template: Hash of the chat template.
        base: Hash of the base.
        settings: Every setting that is not in FREE.
    """

    train_rows: str
    held_out_rows: str
    template: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, now: RunFingerprint) -> list[tuple[str, str, str]]:
        """Return (name, then, now) of everything that differs, the most informative first."""
        names = {"base": "the base", "template": "the chat template", "train_rows": "the training rows"}
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
        hashes = (made.train_rows, made.held_out_rows, made.template, made.base)
        if not _are_texts(hashes) or not isinstance(made.settings, Mapping):
            raise TypeError("no fingerprint")
        return made


@dataclass(frozen=True)
class RunIdentity:
    """Hold the content of `fingerprint.json`.

    Attributes:
        run: Id of the run, which its checkpoints repeat.
        fingerprint: What determines the run.
        environment: Versions, device and threads at its start. Another environment may change the last bits.
        adapter: File name -> sha256 of the trained adapter; empty before the run ends.
    """

    run: str
    fingerprint: RunFingerprint
    environment: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunIdentity:
        """Return the identity in the file at `path`. Raises RunDirError for a missing or damaged file."""
        try:
            saved = read_json(path, RunDirError)
            adapter = dict(saved.get("adapter", {}))
            if not _are_texts((saved["run"], *adapter.values())):
                raise TypeError("no identity")
            fingerprint = RunFingerprint.from_dict(saved["fingerprint"])
            return cls(saved["run"], fingerprint, dict(saved["environment"]), adapter)
        except (RunDirError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(
                "the run's fingerprint cannot be read, so the run cannot resume",
                where=str(path),
                fix="pass --restart, which moves the old run to another folder",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        saved = {"run": self.run, "fingerprint": self.fingerprint.to_dict(), "environment": dict(self.environment)}
        return {**saved, "adapter": dict(self.adapter)} if self.adapter else saved

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
