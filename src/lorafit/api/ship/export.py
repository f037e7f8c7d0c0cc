"""export: write a run as its server wants it, and prove it there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lorafit.api.merge import merge, template_of, verification_records, verification_rows
from lorafit.api.ship.finishing import Finishing
from lorafit.backbone import base_fingerprint, load_backbone, redirect_library_logs, require_same_base
from lorafit.config import MergeBase, base_folder
from lorafit.errors import UsageError
from lorafit.export import FORMATS, format_named, verify
from lorafit.export.companions import write_text_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import Gguf
from lorafit.export.serving import BASE, LORA_FILE, SERVING_FILE, AdaptersFolder, GgufAdaptersFolder
from lorafit.export.verify import VERIFICATION_FILE, record_proofs, write_chat_template
from lorafit.findings import Finding, has_errors
from lorafit.methods import method_of
from lorafit.methods.lora import adapts_experts
from lorafit.programs import find_vllm
from lorafit.runs import LAST, RunDir, staged_folder

Target = Literal["merged", "adapter", "gguf", "gguf-lora"]
OPTIONS_OF = {"quantization": ("gguf", "gguf-lora"), "onto": ("merged", "gguf"), "name": ("adapter", "gguf-lora")}
"""Options of some exports alone, with those exports."""
DEFAULT_PRECISION = "q8_0"
"""Precision of a GGUF file that is not named."""
VerifyIn = Literal["auto", "vllm", "none"]
Verdict = Literal["proved", "not proved", "failed"]
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FOLDERS = {"adapter": "adapters", "gguf-lora": "gguf-lora"}
"""Name of the folder in the run's exports, by what is exported."""
CANNOT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ExportedRun:
    """Hold a written export and its proofs.

    Attributes:
        folder: the export's folder.
        proved_in: the folder with the proofs: that of the adapter, if there are several.
        findings: findings about its prompt.
        wanted: programs whose proof was asked for by name.
    """

    folder: Path
    proved_in: Path
    findings: tuple[Finding, ...]
    wanted: tuple[str, ...] = ()

    @property
    def verification(self) -> dict[str, Any]:
        """Return the content of verification.json."""
        content: dict[str, Any] = json.loads((self.proved_in / VERIFICATION_FILE).read_text(encoding="utf-8"))
        return content

    @property
    def serving(self) -> dict[str, Any]:
        """Return the content of serving.json."""
        content: dict[str, Any] = json.loads((self.folder / SERVING_FILE).read_text(encoding="utf-8"))
        return content

    @property
    def passed(self) -> bool:
        """Return False if the export failed in an engine."""
        failed = any(engine["status"] == "failed" for engine in self.verification["engines"])
        return not failed and not has_errors(self.findings)

    @property
    def verdict(self) -> Verdict:
        """Return failed, not proved where a wanted program is not here, or proved."""
        if not self.passed:
            return "failed"
        proved = {engine["engine"] for engine in self.verification["engines"] if engine["status"] == "proved"}
        return "proved" if proved.issuperset(self.wanted) else "not proved"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        findings = [finding.to_dict() for finding in self.findings]
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "folder": str(self.folder),
            "verification": self.verification,
            "serving": self.serving,
            "findings": findings,
        }


def export(
    run: str | Path,
    *,
    to: str = "merged",
    quantization: str | None = None,
    onto: MergeBase | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    checkpoint: str = LAST,
    verify_in: str = "auto",
) -> ExportedRun:
    """Export `run` for the program that serves it, and prove it there.

    The export appears whole or not at all. `onto` and `checkpoint` are as in `merge`.

    Args:
        run: the run directory.
        to: "merged" for transformers and vLLM; "gguf" for llama.cpp and Ollama; "adapter" for vLLM, a folder with the
            base once and every adapter by its name; "gguf-lora", such a folder for llama.cpp.
        quantization: the precision of a GGUF file, by default q8_0.
        name: the adapter's name, by default the run's.
        verify_in: "vllm" opens the export in vLLM too, which takes minutes; "auto" does so where vLLM is beside this
            Python or named by LORAFIT_VLLM.

    Raises UsageError, RunDirError, BackboneError, AdapterError, TemplateError or VerificationError.
    """
    to, precision = _checked(to, quantization, onto=onto, name=name, verify_in=verify_in)
    asks_vllm = verify_in == "vllm" or (verify_in == "auto" and find_vllm() is not None)
    wanted = ("vLLM",) if verify_in == "vllm" else ()
    if to in ("adapter", "gguf-lora"):
        opened = RunDir.open(Path(run))
        path = Path(out) if out else opened.exports / FOLDERS[to]
        folder = GgufAdaptersFolder(path, _gguf(precision)) if to == "gguf-lora" else AdaptersFolder(path)
        return _export_adapter(opened, folder, name, checkpoint, asks_vllm=asks_vllm, wanted=wanted)
    form = "safetensors" if to == "merged" else f"gguf-{precision}"
    merged = merge(run, onto=onto, out=out, export_format=form, checkpoint=checkpoint, asks_vllm=asks_vllm)
    return ExportedRun(merged.folder, merged.folder, tuple(merged.findings), wanted)


def _checked(
    to: str, quantization: str | None, *, onto: str | None, name: str | None, verify_in: str
) -> tuple[str, str]:
    """Return the export and its GGUF precision as lorafit spells them. Raises UsageError for what it cannot obey."""
    to, quantization = to.lower(), None if quantization is None else quantization.lower().replace("-", "_")
    if to not in get_args(Target):
        raise UsageError(f"'{to:.40}' is no export", where="--to", fix=f"choose {', '.join(get_args(Target))}")
    if verify_in not in get_args(VerifyIn):
        fix = f"choose {', '.join(get_args(VerifyIn))}"
        raise UsageError(f"'{verify_in:.40}' is no program of a proof", where="--verify-in", fix=fix)
    _require_fitting(to, quantization=quantization, onto=onto, name=name)
    precision = quantization or DEFAULT_PRECISION
    if to.startswith("gguf") and f"gguf-{precision}" not in FORMATS:
        fix = f"choose {', '.join(name.removeprefix('gguf-') for name in FORMATS if name.startswith('gguf-'))}"
        raise UsageError(f"'{precision:.40}' is no precision of a GGUF file", where="--quantization", fix=fix)
    if verify_in == "vllm" and to.startswith("gguf"):
        raise UsageError(
            "vLLM proves no GGUF file", where="--verify-in", fix="leave --verify-in out, as llama.cpp proves it"
        )
    return to, precision


def _require_fitting(to: str, **options: str | None) -> None:
    """Raise UsageError for an option that the export `to` would not obey."""
    for option, targets in OPTIONS_OF.items():
        if options[option] is not None and to not in targets:
            fix = f"leave it out, or choose --to {' or '.join(targets)}"
            raise UsageError(f"--to {to} has no {option}", where=f"--{option}", fix=fix)


def _export_adapter(
    run: RunDir, folder: AdaptersFolder, name: str | None, checkpoint: str, *, asks_vllm: bool, wanted: tuple[str, ...]
) -> ExportedRun:
    name = name or (CANNOT.sub("-", run.path.resolve().name).strip(".-") or "adapter")
    if not ADAPTER_NAME.fullmatch(name) or name == BASE:
        what = f"'{name:.70}' is no adapter's name"
        raise UsageError(what, where="--name", fix="use up to 64 letters, digits, dots, dashes and underscores")
    with redirect_library_logs(run.log, optional=True):
        finished = FinishedRun.open(run.path, checkpoint)
        config = finished.config
        if config.method == "full":
            what = "a full run has no adapter: every weight is its own"
            raise UsageError(what, where=str(run.path), fix="export it with --to merged or --to gguf")
        if config.dora:
            what = "the run is DoRA, and neither vLLM nor llama.cpp serves DoRA adapters"
            raise UsageError(what, where=str(run.path), fix="export it with --to merged or --to gguf")
        if config.trainable_tokens or config.modules_to_save:
            trained = "rows of the embedding" if config.trainable_tokens else " and ".join(config.modules_to_save)
            what = f"the run trained {trained}, which vLLM and llama.cpp take from the base alone"
            raise UsageError(what, where=str(run.path), fix="export it with --to merged or --to gguf")
        if adapts_experts(config):
            what = "the run has adapters on experts, and this export is for adapters on linear modules"
            raise UsageError(what, where=str(run.path), fix="export it with --to merged")
        base = base_folder(config.base, config.revision, weights=True)
        require_same_base(base, run.base_fingerprint())
        if isinstance(folder, GgufAdaptersFolder):
            folder.form.require_base(base)
            folder.form.require_rows(base, verification_rows(run, template_of(run)))
        identity = {
            "fingerprint": run.base_fingerprint() or base_fingerprint(base),
            "quantization": config.quantization,
            "template": finished.template.sha256,
        }
        with _folder_with_base(folder, finished, folder.identity_of(identity), name) as (held, findings):
            with staged_folder(held.adapter(name)) as staged:
                findings += _write_adapter(finished, held, staged, run, name, asks_vllm)
            held.write_settings(finished)
    return ExportedRun(folder.path, folder.adapter(name), tuple(findings), wanted)


@contextmanager
def _folder_with_base(
    folder: AdaptersFolder, run: FinishedRun, identity: dict[str, Any], name: str
) -> Iterator[tuple[AdaptersFolder, list[Finding]]]:
    """Yield the folder to add an adapter to: the existing one of the same base, or a new one with its base."""
    if folder.path.exists():
        folder.require_same_base(identity)
        if folder.adapter(name).exists():
            what = f"the folder has an adapter '{name}' already"
            raise UsageError(what, where=str(folder.path), fix="choose another --name, or remove its folder")
        yield folder, []
        return
    with staged_folder(folder.path) as staged:
        held = replace(folder, path=staged)
        yield held, held.write_base(run, identity)


def _write_adapter(
    run: FinishedRun, held: AdaptersFolder, staged: Path, folder: RunDir, name: str, asks_vllm: bool
) -> list[Finding]:
    """Write the adapter of `run` to `staged`, and prove it over the base in `held`."""
    config, method, entry = run.config, method_of(run.config), held.entry(run)
    held.write_adapter(run, staged)
    write_text_companions(run, staged)  # neither checkpoints nor adapters of an older release have them
    held.write_card(run, staged)
    findings = write_chat_template(run, staged)
    live = method.load(load_backbone(config, exact=True), run.adapter, config)
    rows = verification_rows(folder, template_of(folder))
    verification = verify(live, staged, rows, "quantized", method=method, export_format=entry)
    finishing = Finishing(run, verification_records(folder), rows, asks_vllm)
    proved = finishing.prove(staged, live, entry, verification, held.serving_of(run, name, staged))
    record_proofs(staged, proved.proofs)
    if isinstance(held, GgufAdaptersFolder):
        finishing.write_modelfile(staged, f"../../{held.base.name}/{held.form.file}", LORA_FILE)
    return findings + proved.findings


def _gguf(quantization: str) -> Gguf:
    """Return the GGUF format of `quantization`, whose packages are here."""
    form = format_named(f"gguf-{quantization}")
    assert isinstance(form, Gguf)
    form.require_packages("gguf", "xllamacpp")
    return form
