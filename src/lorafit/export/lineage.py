"""Lineage: where trained weights come from, written beside every export."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorafit.config import RunConfig, read_json
from lorafit.errors import RunDirError
from lorafit.runs import RunDir, RunIdentity

LINEAGE_FILE = "lineage.json"
CARD_SETTINGS = (
    "method",
    "objective",
    "rank",
    "alpha",
    "init_lora_weights",
    "dropout",
    "targets",
    "quantization",
    "lr",
    "epochs",
    "examples_per_step",
)
"""Settings that the model card lists; lineage.json has all."""


@dataclass(frozen=True)
class Lineage:
    """Hold the origin of trained weights; hashes are sha256, hex.

    Attributes:
        base: The base, as a hub id or the name of its folder.
        revision: The base's hub revision, if one was set.
        base_sha256: Hash of the base.
        data: Names of the data files.
        train_rows: Number of training rows.
        train_sha256: Hash of the training rows.
        held_out_rows: Number of held-out rows.
        held_out_sha256: Hash of the held-out rows.
        template_sha256: Hash of the chat template.
        settings: Every setting that determines the weights.
        versions: Versions of the libraries, device and threads.
        steps: Optimizer steps.
        loss: Loss of the last step.
        eval_loss: The last held-out loss, if it was measured.
        date: Day of the end of training, UTC.
        init_adapter: Name and hash of the adapter that training began with, if there was one.
    """

    base: str
    revision: str | None
    base_sha256: str
    data: tuple[str, ...]
    train_rows: int
    train_sha256: str
    held_out_rows: int
    held_out_sha256: str
    template_sha256: str
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    steps: int
    loss: float | None
    eval_loss: float | None
    date: str
    init_adapter: tuple[str, str] | None = None

    @classmethod
    def of(cls, run: RunDir) -> Lineage:
        """Return the lineage of the run that ends now in `run`. Raises RunDirError for a damaged file."""
        config, identity = run.config(), RunIdentity.read(run.identity)
        print_, sides = identity.fingerprint, _sides(run.split)
        metrics = list(_metrics(run.metrics))
        return cls(
            base=base_name(config),
            revision=config.revision,
            base_sha256=print_.base,
            data=tuple(Path(name).name for name in config.data),
            train_rows=sides.count("train"),
            train_sha256=print_.train_rows,
            held_out_rows=sides.count("holdout"),
            held_out_sha256=print_.held_out_rows,
            template_sha256=print_.template,
            settings=dict(print_.settings),
            versions=dict(identity.environment),
            steps=max((entry["step"] for entry in metrics), default=0),
            loss=_last(metrics, "loss"),
            eval_loss=_last(metrics, "eval_loss"),
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            init_adapter=(Path(config.init_adapter).name, print_.init_adapter) if config.init_adapter else None,
        )

    @classmethod
    def read(cls, folder: Path) -> Lineage | None:
        """Return the lineage in `folder`; None for weights of an older release, which wrote none."""
        path = folder / LINEAGE_FILE
        if not path.is_file():
            return None
        try:
            fields = read_json(path, RunDirError, fix="restore the run directory")
            return cls(**{**fields, "data": tuple(fields["data"])})
        except (KeyError, TypeError) as error:
            raise RunDirError("the file is damaged", where=str(path), fix="restore the run directory") from error

    def at_step(self, step: int, eval_loss: float | None, metrics: Path) -> Lineage:
        """Return the lineage of the weights after `step`, an earlier one of the same run."""
        losses = [entry.get("loss") for entry in _metrics(metrics) if entry["step"] == step]
        loss = next((each for each in losses if each is not None), None)
        return replace(self, steps=step, loss=loss, eval_loss=eval_loss)

    def write(self, folder: Path) -> None:
        """Write lineage.json to `folder`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        (folder / LINEAGE_FILE).write_text(text, encoding="utf-8")

    def card(self) -> str:
        """Return the lineage as a Markdown table."""
        rows = [
            ("base", f"{self.base}{f' at {self.revision}' if self.revision else ''}, sha256 `{self.base_sha256[:16]}`"),
            *self._begun_with(),
            ("data", f"{self.train_rows} rows of {', '.join(self.data)}, sha256 `{self.train_sha256[:16]}`"),
            ("held-out rows", f"{self.held_out_rows}, sha256 `{self.held_out_sha256[:16]}`"),
            ("chat template", f"sha256 `{self.template_sha256[:16]}`"),
            ("settings", ", ".join(f"{k} {_plain(self.settings[k])}" for k in CARD_SETTINGS if k in self.settings)),
            ("optimizer steps", str(self.steps)),
            ("loss of the last step", _number(self.loss)),
            ("held-out loss", _number(self.eval_loss)),
            ("versions", ", ".join(f"{name} {value}" for name, value in self.versions.items() if name in LIBRARIES)),
            ("trained on", f"{self.versions.get('device', 'unknown')}, {self.date}"),
        ]
        lines = [f"| {name} | {value} |" for name, value in rows]
        return "\n".join(["| lineage | |", "|---|---|", *lines]) + "\n"

    def _begun_with(self) -> list[tuple[str, str]]:
        if self.init_adapter is None:
            return []
        name, digest = self.init_adapter
        return [("begun with", f"the adapter of {name}, sha256 `{digest[:16]}`")]


LIBRARIES = ("lorafit", "torch", "transformers", "peft", "bitsandbytes")


def base_name(config: RunConfig) -> str:
    """Return the base's hub id, or the name of its folder without the machine's path."""
    return Path(config.base).name if Path(config.base).is_dir() else config.base


def _sides(split: Path) -> list[str]:
    """Return train or holdout for each row of the run."""
    if not split.is_file():
        return []
    return [line.partition("\t")[0] for line in split.read_text(encoding="utf-8", errors="replace").splitlines()]


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield entry


def _last(metrics: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(metrics) if entry.get(key) is not None), None)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
