"""RunDir: the run directory, what lies where in it, and whether its adapter is the one that was trained."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.config.resolve import load_recipe, resolve
from lorafit.config.run_config import RunConfig
from lorafit.errors import AdapterError, RunDirError
from lorafit.runs.identity import RunIdentity
from lorafit.runs.writing import LOCK, OWNER, sync

PLACES = ("base", "revision", "data", "holdout")
"""Settings that name files: a run goes by what is in them."""
LEFTOVERS = {"data", "log.txt", "findings.json", "rejected.jsonl", "split.tsv", ".writable", LOCK, OWNER} | {
    "plan.json",
    "template.json",
    "held-out.jsonl",
    "base.json",
    "fingerprint.json",
    "engine.json",
    "events.jsonl",
}
"""What may lie in the folder of a new run: reports of one that never started, and the data (the demo's)."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside one run directory. A folder holds a run once `run.yaml` is in it."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def findings(self) -> Path:
        return self.path / "findings.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def template(self) -> Path:
        return self.path / "template.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def split(self) -> Path:
        """Which rows were held out."""
        return self.path / "split.tsv"

    @property
    def samples(self) -> Path:
        """Some held-out rows as {"messages", "source"} lines: what merge verifies on."""
        return self.path / "held-out.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def events(self) -> Path:
        """What happened besides steps: one JSON line each."""
        return self.path / "events.jsonl"

    @property
    def identity(self) -> Path:
        """The run's id, and the fingerprint of what it is trained from and how."""
        return self.path / "fingerprint.json"

    @property
    def engine(self) -> Path:
        """How the layers were run: the policy that the dry run settled on, and what it measured."""
        return self.path / "engine.json"

    @property
    def holds_run(self) -> bool:
        """True once a run has started here."""
        return self.settings.exists()

    @property
    def has_checkpoint(self) -> bool:
        """True when there is a checkpoint, be it whole or not."""
        return any(self.checkpoints.glob("step-*[0-9]"))

    @property
    def has_result(self) -> bool:
        """True when trained weights are here. Their folder appears whole or not at all, by whatever method."""
        return any(self.adapter.glob("*.safetensors"))

    @property
    def is_finished(self) -> bool:
        """True when the run here has trained to its end."""
        return self.holds_run and self.has_result

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Make (or reuse, when no run is in it) the folder of a new run, and prove that it can be written."""
        run = cls(path)
        run.refuse_if_taken()
        run.require_writable()
        return run

    def require_writable(self) -> None:
        """Make the folder if it is not there, and write to it. RunDirError when that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RunDirError(
                f"cannot write there ({error.strerror})", where=str(self.path), fix="choose another --out"
            ) from error

    def refuse_if_taken(self) -> None:
        """RunDirError when the folder holds a run, or anything that is not a leftover of a run that never started."""
        if self.holds_run:
            state = "a run" if self.is_finished else "a run that has not finished"
            raise RunDirError(f"this folder already holds {state}", where=str(self.path), fix="choose another --out")
        foreign = self.foreign()
        if foreign:
            what = f"this folder holds other files, such as {foreign[0]}"
            raise RunDirError(what, where=str(self.path), fix="choose an empty or new folder for --out")

    def foreign(self) -> list[str]:
        """Names in the folder that no run left there before it started."""
        if not self.path.is_dir():
            return []
        names = sorted(path.name for path in self.path.iterdir())
        return [name for name in names if not self._is_leftover(name)]

    def _is_leftover(self, name: str) -> bool:
        if name == self.checkpoints.name:  # made, empty, before the run begins
            return self.checkpoints.is_dir() and not any(self.checkpoints.iterdir())
        return name in LEFTOVERS or (name.startswith(".") and name.endswith(".staged"))

    def move_aside(self) -> Path:
        """Rename the folder to NAME.aside-1, -2, …, the first that is free; where it is now."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.aside-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise RunDirError(
                f"the old run cannot be moved aside ({error.strerror})", where=str(self.path), fix="check the folder"
            ) from error
        for name in (LOCK, OWNER):
            (aside / name).unlink(missing_ok=True)
        return aside

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """The run in `path`, finished or at least trained to an adapter. RunDirError when there is none."""
        run = cls(path)
        if not run.settings.is_file():
            raise RunDirError(
                "there is no run here (no run.yaml)", where=str(path), fix="pass the folder that train made"
            )
        if not run.has_result:
            raise run._unfinished()
        base = Path(run.config().base)
        if base.is_absolute() and not base.exists():
            fix = "if it has moved, give the train command again with the new --base: the run takes it up"
            raise RunDirError("the base of this run is not there any more", where=str(base), fix=fix)
        return run

    @property
    def base(self) -> Path:
        """What the base was when training began: its name and content fingerprint."""
        return self.path / "base.json"

    def _unfinished(self) -> RunDirError:
        whole = sorted(self.checkpoints.glob("step-*"))
        kept = f"its last checkpoint is {whole[-1]}, with the adapter of that step in adapter/" if whole else ""
        what = "this run has no adapter: its training has not finished" + (f" ({kept})" if kept else "")
        return RunDirError(what, where=str(self.path), fix="the train command that began it goes on with it")

    def base_fingerprint(self) -> str | None:
        """The base's content fingerprint at training time, or None where the run did not record one."""
        if not self.base.is_file():
            return RunIdentity.read(self.identity).fingerprint.base if self.identity.is_file() else None
        return str(read_json(self.base, RunDirError, fix="restore the run directory").get("fingerprint"))

    def config(self) -> RunConfig:
        """The settings the run was made with."""
        return resolve(recipe=load_recipe(self.settings)).config

    def write_config(self, config: RunConfig, sources: Mapping[str, str]) -> None:
        """Write run.yaml, each value with its source as a comment; the file is itself a recipe."""
        lines = ["# every setting of this run and who set it; `lorafit train run.yaml` runs it again"]
        # `out` is where this run went; running it again goes elsewhere
        for key, value in {**config.model_dump(mode="json"), "out": None}.items():
            # JSON is YAML, and always one line
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}  # {sources[key]}")
        write_text(self.settings, "\n".join(lines) + "\n")

    def follow_files(self, config: RunConfig) -> None:
        """Write the places of base and data that `config` has into run.yaml, where they have moved."""
        then = self.config()
        moved = {key: getattr(config, key) for key in PLACES if getattr(config, key) != getattr(then, key)}
        lines = self.settings.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            key = line.partition(":")[0]
            if key in moved:
                lines[number] = f"{key}: {json.dumps(moved[key], ensure_ascii=False)}  # moved"
        if moved:
            write_text(self.settings, "\n".join(lines) + "\n")

    def write_json(self, path: Path, content: Any) -> None:
        """Write one of the run's JSON files whole, or not at all."""
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: staged beside it, fsynced, renamed. RunDirError when the disk refuses."""
    staged = path.with_name(f".{path.name}.staged")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        sync(path.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise RunDirError(
            f"cannot write the file ({error.strerror})", where=str(path), fix="free some space"
        ) from error


def adapter_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 (hex) of every file in `folder`. OSError when one cannot be read."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file()}


def changed_file(folder: Path, hashes: Mapping[str, str]) -> str | None:
    """The first file of `hashes` that is missing from `folder`, unreadable or another one; None when there is none."""
    for name, digest in hashes.items():
        try:
            if file_hash(folder / name) != digest:
                return name
        except OSError:
            return name
    return None


def require_trained_adapter(run: RunDir) -> None:
    """AdapterError unless the adapter of `run` is the one that was saved; a run that kept no hashes is not checked."""
    if not run.identity.is_file():
        return
    changed = changed_file(run.adapter, RunIdentity.read(run.identity).adapter)
    if changed is not None:
        raise AdapterError(
            f"the adapter is not the one that was trained ({changed} has changed)",
            where=str(run.adapter),
            fix="give the same train command again, which restores it, or train anew with --restart",
        )


def file_hash(path: Path) -> str:
    """Return the sha256 (hex) of the file at `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
