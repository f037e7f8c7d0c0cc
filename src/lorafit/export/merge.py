"""merge: merge one run into a folder of plain weights that a server loads."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone import (
    FreshWeight,
    fresh_weights,
    frozen_weights,
    load_backbone,
    quantize,
    require_same_base,
    require_twin,
)
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.config import MergeBase, RunConfig, base_folder
from lorafit.errors import RunDirError
from lorafit.export.companions import write_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import DEFAULT_FORMAT, ExportFormat, OwnTokenizer, Safetensors, format_named, in_dtype
from lorafit.export.model_card import model_card
from lorafit.export.verify import check_own_tokenizer, write_chat_template
from lorafit.findings import Finding
from lorafit.methods import TrainedWeights, method_of
from lorafit.runs import LAST, RunDir, staged_folder

SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class MergeReport:
    """Hold the result of a merge.

    Attributes:
        folder: The model folder.
        onto: The base that the delta was added to.
        shards: The number of weight files.
        total_bytes: Bytes of all tensors.
        merged_weights: The number of weights with a delta.
        elapsed_s: Seconds of writing.
        findings: Findings about the exported prompt.
        step: The optimizer step of the weights; None for the end of training.
    """

    folder: Path
    onto: MergeBase
    shards: int
    total_bytes: int
    merged_weights: int
    elapsed_s: float
    findings: tuple[Finding, ...]
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        findings = [finding.to_dict() for finding in self.findings]
        return asdict(self) | {"folder": str(self.folder), "findings": findings}


def merge(
    run_dir: Path,
    *,
    onto: MergeBase = "quantized",
    out: Path | None = None,
    device: str | torch.device | None = None,
    fingerprint: str | None = None,
    base: str | None = None,
    export_format: ExportFormat | None = None,
    dtype: str = "auto",
    checkpoint: str = LAST,
    prove: Callable[[Path, MergeBase, ExportFormat], list[Finding]] | None = None,
) -> MergeReport:
    """Merge the trained weights of `run_dir` into its base, and write a model folder.

    The folder appears completely or not at all. `onto` "quantized" adds the delta to the dequantized 4-bit base, the
    model that was trained; "original" adds it to the checkpoint as stored, or to the 16-bit model `base`. A run over an
    unquantized base has the original only, and a full run is written as it is. `out` is by default
    `run_dir/exports/merged-<onto>`, or `full`. `fingerprint` is the base's at training time: another is refused.
    `dtype` is that of the weights, see `in_dtype`; `checkpoint` is last, best or a step. `prove` is called with the
    folder of the written files before it gets its name, and returns findings; if it raises, no files are left.

    Raises RunDirError (taken, disk full), VerificationError (untrained, other base), AdapterError and BackboneError.
    """
    started = time.monotonic()
    run = FinishedRun.open(run_dir, checkpoint)
    form = export_format or format_named(DEFAULT_FORMAT)
    onto = _start_of(run.config, onto)
    source, place = _source(run.config, fingerprint, base if onto == "original" else None)
    form = in_dtype(form, dtype, onto, place)
    trained = method_of(run.config).trained_weights(run.adapter, run.config)
    folder = RunDir(run_dir).exports / f"{_folder_name(onto, form)}{run.weights.suffix}" if out is None else out
    with staged_folder(folder) as staged:
        _check_space(place, staged, form)
        findings = _write_companions(run, staged, onto, form, source)
        weights = merged_weights(trained.source(source), onto, trained, device, _keeps_dtype(form))
        written = form.write(weights, staged)
        elapsed = time.monotonic() - started
        if prove is not None:
            findings += prove(staged, onto, form)
        elif isinstance(form, OwnTokenizer):
            findings += check_own_tokenizer(run, staged, form)[1]
    return MergeReport(
        folder, onto, len(written.files), written.total_bytes, len(trained), elapsed, tuple(findings), run.weights.step
    )


def _start_of(config: RunConfig, onto: MergeBase) -> MergeBase:
    """Return what the export of a run starts from: `onto`, unless its base was not quantized."""
    if config.quantization != "none":
        return onto
    return "whole" if config.method == "full" else "original"


def _source(config: RunConfig, fingerprint: str | None, base: str | None) -> tuple[RunConfig, Path]:
    """Return settings and folder of the base to merge onto: the run's own, or its 16-bit original `base`."""
    own = base_folder(config.base, config.revision, weights=True)
    require_same_base(own, fingerprint)
    if base is None:
        return config, own
    place = base_folder(base, weights=True)
    require_twin(own, place)
    return config.model_copy(update={"base": base, "revision": None}), place


def merged_weights(
    config: RunConfig,
    onto: MergeBase,
    trained: TrainedWeights,
    device: str | torch.device | None = None,
    keeps_dtype: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (stored name, tensor) of the merged model.

    Floating-point tensors are in fp32, and the format rounds them; with `keeps_dtype` they are rounded to the dtype of
    the base's tensor. Raises VerificationError at the end if a trained weight has no counterpart in the base.
    """
    for fresh, tensor in _merged(config, onto, trained, device):
        keeps = keeps_dtype and tensor.is_floating_point()
        yield from fresh.parts(tensor.to(fresh.tensor.dtype) if keeps else tensor).items()


def requantized(config: RunConfig, onto: MergeBase, trained: TrainedWeights) -> nn.Module:
    """Return the merged model in NF4, as it would load from a bf16 merge onto `onto`, without writing one."""
    model = load_backbone(config, exact=True)
    linears = frozen_weights(model)
    others = dict(model.named_parameters())
    for fresh, tensor in _merged(config, onto, trained, None):
        linear = linears.get(fresh.parameter)
        rounded = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        if linear is not None:
            dense = rounded.to(linear.weight.device).view(linear.out_features, linear.in_features)
            linear.weight = quantize(dense, compute_dtype=linear.compute_dtype).weight
        elif fresh.parameter in others:
            others[fresh.parameter].data.copy_(rounded)
    return model


def _merged(
    config: RunConfig, onto: MergeBase, trained: TrainedWeights, device: str | torch.device | None
) -> Iterator[tuple[FreshWeight, Tensor]]:
    """Yield (base's tensor, merged tensor); floating-point ones are in fp32."""
    met: set[str] = set()
    deltas = trained if isinstance(trained, Mapping) else ()
    for fresh in fresh_weights(config, onto, device=device, fused=deltas):
        met.add(fresh.parameter)
        plain = fresh.tensor.is_floating_point()
        yield fresh, trained.merged(fresh.parameter, fresh.tensor.float()) if plain else fresh.tensor
    trained.check_found(met)


def _write_companions(
    run: FinishedRun, folder: Path, onto: MergeBase, form: ExportFormat, source: RunConfig
) -> list[Finding]:
    write_companions(run, folder, form.dtype)
    lineage = run.lineage()
    if lineage is not None:
        lineage.write(folder)
    (folder / "README.md").write_text(model_card(run.config, onto, form, lineage, source), encoding="utf-8")
    return write_chat_template(run, folder)


def _keeps_dtype(form: ExportFormat) -> bool:
    return isinstance(form, Safetensors) and form.keeps_dtype


def _folder_name(onto: MergeBase, form: ExportFormat) -> str:
    name = "full" if onto == "whole" else f"merged-{onto}"
    return name if form.name == DEFAULT_FORMAT else f"{name}-{form.name}"


def _check_space(base: Path, staged: Path, form: ExportFormat) -> None:
    entries = Checkpoint.open(base).entries()
    needed = sum(_merged_bytes(entry, form.bytes_per_weight) for _, _, entry in entries) + SPARE_BYTES
    free = shutil.disk_usage(staged).free
    if free < needed:
        raise RunDirError(
            f"the merged model takes {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on the disk",
            where=str(staged.parent),
            fix="free some space, or pass --out on another disk",
        )


def _merged_bytes(entry: Any, bytes_per_weight: float) -> int:
    begin, end = entry["data_offsets"]
    # a byte holds two 4-bit weights
    stored = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 0.5}
    return int((end - begin) * bytes_per_weight / stored.get(entry["dtype"], bytes_per_weight))
