"""merge: one run into one folder of 16-bit weights that any server loads."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters import Deltas, merge_delta, staged_folder
from lorafit.backbone import Onto, fresh_weights, require_same_base
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.config import RunConfig, RunDir, base_folder
from lorafit.errors import RunDirError
from lorafit.export.companions import write_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.prompt_check import write_chat_template
from lorafit.export.shards import MAX_SHARD_BYTES, write_shards
from lorafit.findings import Finding

MERGED_DTYPE = torch.bfloat16
SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote: the folder, onto what, shards, bytes, merged weights, and how long it took."""

    folder: Path
    onto: Onto
    shards: int
    total_bytes: int
    merged_weights: int
    elapsed_s: float
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        findings = [finding.to_dict() for finding in self.findings]
        return asdict(self) | {"folder": str(self.folder), "findings": findings}


def merge(
    run_dir: Path,
    *,
    onto: Onto = "quantized",
    out: Path | None = None,
    device: str | torch.device | None = None,
    fingerprint: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    prove: Callable[[Path, Onto], object] | None = None,
) -> MergeReport:
    """Merge the adapter of `run_dir` into its base and write a model folder, whole or not at all.

    `onto` "quantized" adds the delta to the dequantised 4-bit base, the model that was trained; "original" adds it
    to the checkpoint as stored. A run over an unquantised base has the original only. `out` is by default
    `run_dir/exports/merged-<onto>`. `fingerprint` is the base's at training time, to refuse another one. `prove` is
    called with the written files' folder before it gets its name; when it raises, nothing is left.
    Raises RunDirError (taken, disk full), VerificationError (untrained adapter, other base), AdapterError and
    BackboneError.
    """
    started = time.monotonic()
    run = FinishedRun.open(run_dir)
    if run.config.quantization == "none":
        onto = "original"
    folder = RunDir(run_dir).exports / f"merged-{onto}" if out is None else out
    base = base_folder(run.config.base, run.config.revision, weights=True)
    require_same_base(base, fingerprint)
    deltas = Deltas.from_folder(run.adapter)
    with staged_folder(folder) as staged:
        _check_space(base, staged)
        shards = write_shards(merged_weights(run.config, onto, deltas, device), staged, max_shard_bytes)
        write_companions(run, staged, onto)
        findings = write_chat_template(run, staged)
        elapsed = time.monotonic() - started
        if prove is not None:
            prove(staged, onto)
    return MergeReport(folder, onto, len(shards.files), shards.total_bytes, len(deltas), elapsed, tuple(findings))


def merged_weights(
    config: RunConfig, onto: Onto, deltas: Deltas, device: str | torch.device | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of the merged model: base plus delta in fp32, rounded once, to bf16.

    Raises VerificationError at the end when a delta has met no weight.
    """
    met: set[str] = set()
    for fresh in fresh_weights(config, onto, device=device):
        met.add(fresh.parameter)
        tensor = fresh.tensor
        if tensor.is_floating_point():
            tensor = merge_delta(fresh.parameter, tensor.float(), deltas).to(MERGED_DTYPE)
        yield fresh.stored, tensor
    deltas.check_found(met)


def _check_space(base: Path, staged: Path) -> None:
    needed = sum(_merged_bytes(entry) for _, _, entry in Checkpoint.open(base).entries()) + SPARE_BYTES
    free = shutil.disk_usage(staged).free
    if free < needed:
        raise RunDirError(
            f"the merged model takes {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left",
            where=str(staged.parent),
            fix="free some space, or pass --out on another disk",
        )


def _merged_bytes(entry: Any) -> int:
    begin, end = entry["data_offsets"]
    wide = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
    # two 4-bit weights in a byte become four bytes
    return int((end - begin) * (4 if entry["dtype"] == "U8" else 2 / wide.get(entry["dtype"], 2)))
