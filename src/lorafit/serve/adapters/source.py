"""source: an adapter's folder, checked against the base and the template of the server."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafit.backbone import base_fingerprint
from lorafit.config import RunConfig, base_folder
from lorafit.data import Template, TextTokenizer
from lorafit.errors import AdapterError, UsageError, VerificationError
from lorafit.methods import method_of
from lorafit.methods.lora import AdapterFiles, adapts_experts, fitting_weights
from lorafit.runs import LAST, RunDir, adapter_hashes, choose_weights

Weights = Mapping[str, tuple[Tensor, Tensor]]
CHECKPOINTS = "checkpoints"
SAME_SETTINGS = ("quantization", "compute", "method")
"""Settings that change what the base computes: adapters of one server have the same."""


@dataclass(frozen=True)
class ServedBase:
    """Hold what all adapters of a server have in common.

    Attributes:
        config: the settings of the base: name, revision, quantization, compute dtype.
        folder: the base's folder.
        fingerprint: hash of the base's content.
        template: the chat template, with its tokenizer.
        template_file: content of the file that `template` was read from.
    """

    config: RunConfig
    folder: Path
    fingerprint: str
    template: Template
    template_file: bytes

    @classmethod
    def of_run(cls, path: Path) -> ServedBase:
        """Return the base of the run in `path`. Raises RunDirError, BackboneError or TemplateError."""
        run = RunDir.open(path)
        config = run.config()
        folder = base_folder(config.base, config.revision, weights=True)
        template = Template.load(run.template, TextTokenizer.from_base(config.base, config.revision))
        return cls(config, folder, base_fingerprint(folder), template, run.template.read_bytes())


@dataclass(frozen=True)
class AdapterVersion:
    """Hold one content of a named adapter. Another content of the same name is another version.

    Attributes:
        name: the name that requests use.
        folder: the adapter's folder.
        identity: sha256 over base, template and the adapter's files: the key of every cache.
        files: sha256 of each file.
        rank: LoRA's rank.
        scale: LoRA's scale.
    """

    name: str
    folder: Path
    identity: str
    files: tuple[tuple[str, str], ...]
    rank: int
    scale: float

    def read(self, model: nn.Module) -> Weights:
        """Return the weights from disk. Raises AdapterError if a file is no longer the registered one."""
        files = AdapterFiles.open(self.folder)
        weights = fitting_weights(model, files)
        # hashed after reading, so that a file that changed in between is noticed
        if _hashes(self.folder) != self.files:
            what = "the adapter's files have changed since it was loaded"
            raise AdapterError(what, where=str(self.folder), fix="load it again")
        return weights


def open_adapter(
    name: str, path: Path, base: ServedBase, model: nn.Module, roots: Sequence[Path], checkpoint: str = LAST
) -> tuple[AdapterVersion, Weights]:
    """Return the adapter in `path` and its weights: a run directory, its adapter folder, or a checkpoint in it.

    `checkpoint` chooses the weights of a run directory: last, best or a step.

    `roots` are the folders that adapters may lie in. Raises UsageError for other places, AdapterError for files that
    must not be trusted or do not fit, VerificationError and TemplateError for another base or template.
    """
    folder, named = _run_folder(allowed_path(path, roots))
    run = RunDir.open(folder)
    chosen = choose_weights(run, named or checkpoint).folder
    config = run.config()
    require_sums(config, run.path)
    _require_same_settings(config, base.config, run.path)
    if (run.base_fingerprint() or _fingerprint(config)) != base.fingerprint:
        what = "the adapter was trained on another base than the one that is served"
        raise VerificationError(what, where=str(run.path), fix="serve it from a server of its own")
    # an equal file is the template of the server, which has proved its golden prompts
    same = run.template.read_bytes() == base.template_file
    template = base.template if same else Template.load(run.template, base.template.tokenizer)
    if template.sha256 != base.template.sha256 or template.stop_ids != base.template.stop_ids:
        what = "the adapter was trained with another chat template than the one that is served"
        raise VerificationError(what, where=str(run.path), fix="serve it from a server of its own")
    method_of(config).trained_weights(chosen, config)  # raises for an untrained adapter and other settings
    files = AdapterFiles.open(chosen)
    hashes = _hashes(chosen)
    whole = hashlib.sha256(repr((base.fingerprint, template.sha256, hashes)).encode()).hexdigest()
    version = AdapterVersion(name, chosen, whole, hashes, files.rank, files.scale)
    return version, version.read(model)


def require_sums(config: RunConfig, run: Path) -> None:
    """Raise UsageError for a DoRA run and for adapters on experts, which no sum over linears can express."""
    if config.dora:
        what = "the run is DoRA, which rescales the base's weights, and the server only adds adapters to them"
        fix = f"run lorafit export {run} --to gguf, and serve the folder that it names"
        raise UsageError(what, where=str(run), fix=fix)
    if config.trainable_tokens or config.modules_to_save:
        trained = "rows of the embedding" if config.trainable_tokens else " and ".join(config.modules_to_save)
        what = f"the run trained {trained}, which the server's base shares with others"
        fix = f"run lorafit export {run} --to gguf, and serve the folder that it names"
        raise UsageError(what, where=str(run), fix=fix)
    if adapts_experts(config):
        what = "the run has adapters on experts, and the server adds adapters to linear modules only"
        fix = f"run lorafit merge {run}, and talk to the folder that it names with lorafit chat, or serve it with vLLM"
        raise UsageError(what, where=str(run), fix=fix)


def allowed_path(path: Path, roots: Sequence[Path]) -> Path:
    """Return `path` without links. Raises UsageError unless it lies in one of `roots`."""
    try:
        real = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError("no such folder", where=f"{path!s:.200}", fix="name a run directory") from error
    if not any(real == root or root in real.parents for root in roots):
        raise UsageError(
            "adapters are not loaded from this place", where=f"{path!s:.200}", fix="start the server with --adapter-dir"
        )
    return real


def _run_folder(path: Path) -> tuple[Path, str | None]:
    """Return the run directory that holds the weights in `path`, and the name of their checkpoint."""
    if not path.is_dir():
        raise UsageError("an adapter is a folder", where=str(path), fix="name a run directory")
    own = RunDir(path).holds_run
    if not own and path.name == "adapter" and RunDir(path.parent).holds_run:
        return path.parent, None
    if not own and path.parent.name == CHECKPOINTS and RunDir(path.parent.parent).holds_run:
        return path.parent.parent, path.name
    if not own:
        what = "the folder names no run, so its base and its template are unknown"
        raise UsageError(what, where=str(path), fix="name the run directory")
    return path, None


def _require_same_settings(config: RunConfig, served: RunConfig, where: Path) -> None:
    for key in SAME_SETTINGS:
        ours, theirs = getattr(served, key), getattr(config, key)
        if ours != theirs:
            what = f"the adapter was trained with {key}={theirs}, and the server has {ours}"
            raise VerificationError(what, where=str(where), fix="serve it from a server of its own")


def _fingerprint(config: RunConfig) -> str:
    return base_fingerprint(base_folder(config.base, config.revision, weights=True))


def _hashes(folder: Path) -> tuple[tuple[str, str], ...]:
    found: dict[str, Any] = adapter_hashes(folder)
    return tuple(sorted(found.items()))
