"""RunFingerprint: what a run is trained from and how. A run goes on only when nothing of it has changed. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.config.run_config import RunConfig
from lorafit.errors import RunDirError

LAYOUT = ("max_length", "memory_policy", "compile", "deterministic")
"""Settings of layout and speed: they change no step's examples and nothing that is computed but its last bits."""
FREE = frozenset(
    (
        # named by content, not by place: the base, the rows and the template have hashes of their own
        "base", "revision", "data", "field_map", "on_bad", "on_long", "holdout", "out", "max_unpacked",
        # what is shown, kept, asked of the plan, or sent to trackers
        "select", "ignore", "goal", "serving", "gpu", "gpu_memory", "report_to", "eval_steps", "save_steps",
        "save_minutes", "keep_last", "keep_best", "max_bad_steps",
        *LAYOUT,
    )
)  # fmt: skip
"""Settings that may change while a run is under way. Every other one, new ones too, must stay."""


@dataclass(frozen=True)
class RunFingerprint:
    """Hashes (sha256, hex) of content, and every setting that is not FREE."""

    train_rows: str
    held_out_rows: str
    template: str
    base: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, now: RunFingerprint) -> list[tuple[str, str, str]]:
        """(what, then, now) for all that differs, most telling first."""
        names = {"base": "the base", "template": "the chat template", "train_rows": "the training rows"}
        found = [
            (words, _short(getattr(self, name)), _short(getattr(now, name)))
            for name, words in {**names, "held_out_rows": "the held-out rows"}.items()
            if getattr(self, name) != getattr(now, name)
        ]
        return differing_settings(with_defaults(self.settings, now.settings), now.settings) + found

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> RunFingerprint:
        """The fingerprint that `to_dict` wrote. TypeError for another mapping."""
        made = cls(**fields)
        hashes = (made.train_rows, made.held_out_rows, made.template, made.base)
        if not _are_texts(hashes) or not isinstance(made.settings, Mapping):
            raise TypeError("no fingerprint")
        return made


@dataclass(frozen=True)
class RunIdentity:
    """`fingerprint.json`: a run's id, by which its checkpoints know it, its fingerprint, and what it began on.

    `environment` (versions, device, threads) may change while a run is under way, but then the last bits may, too.
    `adapter` (file name -> sha256) is what the run ended in; empty before that.
    """

    run: str
    fingerprint: RunFingerprint
    environment: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunIdentity:
        """Raises RunDirError when the file is missing or damaged."""
        try:
            saved = read_json(path, RunDirError)
            adapter = dict(saved.get("adapter", {}))
            if not _are_texts((saved["run"], *adapter.values())):
                raise TypeError("no identity")
            fingerprint = RunFingerprint.from_dict(saved["fingerprint"])
            return cls(saved["run"], fingerprint, dict(saved["environment"]), adapter)
        except (RunDirError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(
                "what the run was trained from cannot be read, so it cannot go on",
                where=str(path),
                fix="pass --restart, which moves the old run aside",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        saved = {"run": self.run, "fingerprint": self.fingerprint.to_dict(), "environment": dict(self.environment)}
        return {**saved, "adapter": dict(self.adapter)} if self.adapter else saved

    def ended_in(self, adapter: Mapping[str, str]) -> RunIdentity:
        """The identity of the run once it has its adapter (file name -> sha256)."""
        return replace(self, adapter=dict(adapter))


def held_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that must not change while a run is under way, as JSON values."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}


def with_defaults(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return `then` with the default of every setting in `now` that the release which wrote `then` did not know."""
    unknown = [key for key in now if key not in then and key in RunConfig.model_fields]
    return {**RunConfig().model_dump(mode="json", include=set(unknown)), **then}


def differing_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, then, now) of the settings that differ; a key that one side lacks was not known to it."""
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
