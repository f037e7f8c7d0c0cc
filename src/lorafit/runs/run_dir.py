"""RunDir: the paths in a run directory, and how its files are written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.config.resolve import load_recipe, resolve
from lorafit.config.run_config import RunConfig
from lorafit.errors import RunDirError
from lorafit.runs.identity import RunIdentity
from lorafit.runs.leftovers import foreign_names
from lorafit.runs.own_files import new_own, refuse_planted, require_replaceable
from lorafit.runs.seal import file_hashes
from lorafit.runs.writing import LOCK, OWNER, sync

FILE_SETTINGS = ("base", "revision", "data", "holdout")
"""Settings that name files. A run depends on the files' content, so they may move."""
SEALED_FILES = ("template.json", "held-out.jsonl", "split.tsv")
"""Files that `chat`, `merge` and `eval` read, and whose hashes fingerprint.json holds."""


WEIGHTS = {"lora": "adapter", "full": "model"}
"""Folder of the trained weights in a run directory, by method."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Hold the paths of one run directory. A folder holds a run once it has a `run.yaml`."""

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
        """Folder of the trained weights: `adapter`, or `model` after full fine-tuning."""
        model = self.path / WEIGHTS["full"]
        return model if model.is_dir() else self.path / WEIGHTS["lora"]

    def weights_of(self, method: str) -> Path:
        """Return the folder in which a run of `method` keeps its trained weights."""
        return self.path / WEIGHTS.get(method, WEIGHTS["lora"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def split(self) -> Path:
        """List of the held-out rows."""
        return self.path / "split.tsv"

    @property
    def samples(self) -> Path:
        """Some held-out rows as {"messages", "source"} lines, on which merge verifies."""
        return self.path / "held-out.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def events(self) -> Path:
        """Events other than steps, one JSON line each."""
        return self.path / "events.jsonl"

    @property
    def identity(self) -> Path:
        """Id and fingerprint of the run (RunIdentity)."""
        return self.path / "fingerprint.json"

    @property
    def engine(self) -> Path:
        """Memory policy that the dry run chose, and its measurements."""
        return self.path / "engine.json"

    @property
    def holds_run(self) -> bool:
        """True once a run has started in this folder."""
        return self.settings.exists()

    @property
    def has_checkpoint(self) -> bool:
        """True when there is a checkpoint, even an incomplete one."""
        return any(self.checkpoints.glob("step-*[0-9]"))

    @property
    def has_result(self) -> bool:
        """True when the folder has trained weights. Every method writes them atomically."""
        return any(self.adapter.glob("*.safetensors"))

    @property
    def is_finished(self) -> bool:
        """True when the run in this folder is complete."""
        return self.holds_run and self.has_result

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Create the folder of a new run and check that it is writable.

        A folder without a run is reused. Raises RunDirError for any other folder.
        """
        run = cls(path)
        run.refuse_if_taken()
        run.require_writable()
        return run

    def require_writable(self) -> None:
        """Create the folder if necessary and write to it. Raises RunDirError when that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):  # has no name, so it meets no file
                pass
        except OSError as error:
            raise RunDirError(
                f"the folder is not writable ({error.strerror})", where=str(self.path), fix="choose another --out"
            ) from error

    def refuse_if_taken(self) -> None:
        """Raise RunDirError when the folder holds a run or other files.

        Leftovers of a run that never started are allowed.
        """
        if self.holds_run:
            state = "a run" if self.is_finished else "a run that has not finished"
            raise RunDirError(f"this folder already holds {state}", where=str(self.path), fix="choose another --out")
        foreign = self.foreign()
        if foreign:
            what = f"this folder holds other files, such as {foreign[0]}"
            raise RunDirError(what, where=str(self.path), fix="choose an empty or new folder for --out")

    def foreign(self) -> list[str]:
        """Return the names in the folder other than leftovers of a run that never started."""
        return foreign_names(self.path)

    def move_aside(self) -> Path:
        """Rename the folder to the first free NAME.aside-1, -2, … and return that path."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.aside-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise RunDirError(
                f"the old run's folder cannot be renamed ({error.strerror})",
                where=str(self.path),
                fix="check its permissions",
            ) from error
        for name in (LOCK, OWNER):
            (aside / name).unlink(missing_ok=True)
        return aside

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Return the run in `path`.

        Raises RunDirError when it holds a link, has no adapter, or its local base is missing.
        """
        run = cls(path)
        refuse_planted(path)
        if not path.exists():
            raise RunDirError("no such folder", where=str(path), fix="pass the folder that train created")
        if not run.settings.is_file():
            raise _no_run(path)
        if not run.has_result:
            raise run._unfinished()
        base = Path(run.config().base)
        if base.is_absolute() and not base.exists():
            fix = "if it has moved, repeat the train command with the new --base, which the run then records"
            raise RunDirError("the base of this run no longer exists", where=str(base), fix=fix)
        return run

    @property
    def base(self) -> Path:
        """Name and content fingerprint of the base at the start of training."""
        return self.path / "base.json"

    def _unfinished(self) -> RunDirError:
        steps = sorted(self.checkpoints.glob("step-*"))
        last = f" (its last checkpoint is {steps[-1]}, with the adapter of that step in adapter/)" if steps else ""
        what = f"this run has no adapter because its training has not finished{last}"
        return RunDirError(what, where=str(self.path), fix="repeat the train command to resume it")

    def base_fingerprint(self) -> str | None:
        """Return the base's content fingerprint at training time, or None when the run recorded none."""
        if self.identity.is_file():
            return RunIdentity.read(self.identity).fingerprint.base
        if not self.base.is_file():
            return None
        return str(read_json(self.base, RunDirError, fix="restore the run directory").get("fingerprint"))

    def seal_files(self, identity: RunIdentity) -> RunIdentity:
        """Write the hashes of SEALED_FILES into fingerprint.json if they are new. Returns the identity with them."""
        files = file_hashes(self.path / name for name in SEALED_FILES)
        if identity.is_sealed and identity.files == files:
            return identity
        sealing = identity.with_files(files)
        self.write_json(self.identity, sealing.to_dict())
        return sealing

    def config(self) -> RunConfig:
        """Return the settings of the run."""
        return resolve(recipe=load_recipe(self.settings)).config

    def write_config(self, config: RunConfig, sources: Mapping[str, str]) -> None:
        """Write run.yaml, each value with its source as a comment. The file is a valid recipe."""
        lines = ["# every setting of this run and its source; `lorafit train run.yaml` repeats the run"]
        # repeating the run must write to another folder, so `out` is left out
        for key, value in {**config.model_dump(mode="json"), "out": None}.items():
            # JSON is valid YAML and always one line
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}  # {sources[key]}")
        write_text(self.settings, "\n".join(lines) + "\n")

    def follow_files(self, config: RunConfig) -> None:
        """Update run.yaml when base or data files have moved to the paths in `config`."""
        then = self.config()
        moved = {key: getattr(config, key) for key in FILE_SETTINGS if getattr(config, key) != getattr(then, key)}
        lines = self.settings.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            key = line.partition(":")[0]
            if key in moved:
                lines[number] = f"{key}: {json.dumps(moved[key], ensure_ascii=False)}  # moved"
        if moved:
            write_text(self.settings, "\n".join(lines) + "\n")

    def write_json(self, path: Path, content: Any) -> None:
        """Write one of the run's JSON files atomically."""
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: staged beside it, fsynced, renamed.

    A link at `path` is replaced, not followed. A device or a pipe stays as it is. Raises RunDirError when the disk
    refuses.
    """
    staged = path.with_name(f".{path.name}.staged")
    try:
        require_replaceable(path)
        with os.fdopen(new_own(staged), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise RunDirError(
            f"the file cannot be written ({error.strerror})", where=str(path), fix="check the disk"
        ) from error


def _no_run(path: Path) -> RunDirError:
    """Return the error for a path that is no run, with what it is where that is known."""
    if path.is_file():
        is_served, what = path.suffix == ".gguf", "this is a file, and a run is a folder"
        fix = f"lorafit serve {path}, or pass the run" if is_served else "pass the folder that train created"
        return RunDirError(what, where=str(path), fix=fix)
    if (path / "serving.json").is_file() or (path / "serving.yaml").is_file():
        what = "this folder is an export, not a run"
        return RunDirError(what, where=str(path), fix=f"lorafit serve {path}, or pass the run that was exported")
    held_in = path.parents[1] if len(path.parents) > 1 else path
    if path.parent.name == "adapters" and (held_in / "serving.json").is_file():
        what = "this folder is an exported adapter, not a run"
        return RunDirError(what, where=str(path), fix=f"lorafit serve {held_in}, or pass the run that was exported")
    if (path.parent / "run.yaml").is_file():
        return RunDirError("this folder is a part of a run", where=str(path), fix=f"pass {path.parent}")
    return RunDirError(
        "the folder holds no run (no run.yaml)", where=str(path), fix="pass the folder that train created"
    )
