"""Checkpoints: `checkpoints/step-000120/`, staged, fsynced and renamed; no pickle in any of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorafit.adapters import save_adapter
from lorafit.config import RunConfig
from lorafit.errors import RunDirError

FREE_SPACE_MARGIN = 1.2


def write_checkpoint(trainer: Any, folder: Path, config: RunConfig) -> Path | None:
    """Save adapter, optimizer, schedule and random states of `trainer`; drop checkpoints beyond `keep_last`.

    `manifest.json`, with the SHA-256 and size of every other file, is written last. Returns the folder.
    """
    final = folder / f"step-{trainer.state.global_step:06d}"
    if final.exists():
        return final
    staged = folder / f".{final.name}.staged"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_space(folder, trainer.model)
        staged.mkdir()
        save_adapter(trainer.model, staged / "adapter", config, base_name=config.base)
        _save_optimizer(trainer, staged)
        state = {"step": trainer.state.global_step, "epoch": trainer.state.epoch, "log": trainer.state.log_history}
        (staged / "state.json").write_text(json.dumps(state, indent=1))
        _write_manifest(staged, trainer.state.global_step)
        staged.rename(final)
    except (OSError, SafetensorError) as error:
        reason = f"the checkpoint could not be written ({getattr(error, 'strerror', None) or error})"
        raise RunDirError(reason, where=str(final), fix="free some space; earlier checkpoints are whole") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _fsync(folder)
    for old in sorted(folder.glob("step-*"))[: -config.keep_last]:
        shutil.rmtree(old)
    return final


def _save_optimizer(trainer: Any, folder: Path) -> None:
    """optimizer.safetensors (moments by parameter index) and random.safetensors; scalars go to schedule.json."""
    state = trainer.optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, moments in state["state"].items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    save_file(tensors, folder / "optimizer.safetensors")
    random = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    save_file(random, folder / "random.safetensors")
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    schedule = {"last_epoch": trainer.lr_scheduler.last_epoch, "groups": groups, "scalars": scalars}
    (folder / "schedule.json").write_text(json.dumps(schedule, indent=1, default=str))


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _fsync(path)
            content = path.read_bytes()
            files[str(path.relative_to(folder))] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            }
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1))
    _fsync(manifest)
    _fsync(folder)


def _require_space(folder: Path, model: Any) -> None:
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    needed = int(trainable * 12 * FREE_SPACE_MARGIN) + (1 << 20)  # fp32 weights and two fp32 moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunDirError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free",
            where=str(folder),
            fix="free some space; earlier checkpoints are whole",
        )


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
