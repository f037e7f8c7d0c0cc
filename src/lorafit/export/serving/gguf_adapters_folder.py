"""GgufAdaptersFolder: one base as a GGUF file with the adapters of several runs, as llama.cpp and Ollama serve them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafit.errors import UsageError
from lorafit.export.companions import write_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import ExportFormat, Gguf
from lorafit.export.model_card import gguf_adapter_card
from lorafit.export.serving.adapters_folder import ADAPTERS, BASE, AdaptersFolder, base_weights
from lorafit.export.serving.serving_file import ServingFile, gguf_adapter_commands
from lorafit.export.verify import Serving, write_chat_template
from lorafit.findings import Finding
from lorafit.methods import method_of
from lorafit.methods.lora import Deltas
from lorafit.runs import write_text

if TYPE_CHECKING:
    from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel

LORA_FILE = "lora-F32.gguf"


@dataclass(frozen=True)
class GgufAdaptersFolder(AdaptersFolder):
    """Hold the paths of a folder that serves several adapters over one GGUF file.

    `base/` has the weights that the adapters were trained over: an NF4 base is dequantized, since an adapter over the
    original checkpoint is another model.

    Attributes:
        form: the format of the base's file.
    """

    form: Gguf

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters in order."""
        found = (self.path / ADAPTERS).glob(f"*/{LORA_FILE}")
        return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))

    def identity_of(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return `identity` with the file that the adapters share."""
        return identity | {"file": self.form.file}

    def write_base(self, run: FinishedRun, identity: dict[str, Any]) -> list[Finding]:
        """Write `base/` with its file, and return findings about its prompt."""
        self.base.mkdir()
        write_companions(run, self.base, self.form.dtype)
        findings = write_chat_template(run, self.base)  # which the file holds
        self.form.write(base_weights(run.config), self.base)
        self.write_identity(identity)
        return findings

    def write_adapter(self, run: FinishedRun, staged: Path) -> None:
        """Write the adapter of `run` to `staged`. Raises UsageError for a weight that llama.cpp cannot adapt."""
        from lorafit.export.formats.gguf.lora_file import LowRank, write_lora  # its package is optional

        trained = method_of(run.config).trained_weights(run.adapter, run.config)
        if not isinstance(trained, Deltas):
            what = "the run trained more than low-rank adapters"
            raise UsageError(what, where=str(run.folder), fix="export it with --to gguf")
        pairs = ((name, LowRank(each.a.numpy(), each.b.numpy(), each.scale)) for name, each in trained.items())
        write_lora(pairs, self.base, staged / LORA_FILE)

    def write_card(self, run: FinishedRun, staged: Path) -> None:
        """Write lineage and model card to `staged`."""
        lineage = run.lineage()
        if lineage is not None:
            lineage.write(staged)
        card = gguf_adapter_card(run.config, LORA_FILE, f"../../{BASE}/{self.form.file}", lineage)
        write_text(staged / "README.md", card)

    def entry(self, run: FinishedRun) -> ExportFormat:
        """Return the format that opens one adapter over the base's file."""
        return GgufAdapterEntry(self.form.quantization, self.base)

    def serving_of(self, run: FinishedRun, name: str, staged: Path) -> Serving | None:
        """Return None: vLLM serves no GGUF adapters."""
        return None

    def write_settings(self, run: FinishedRun) -> None:
        """Write serving.json for the adapters that the folder holds."""
        files = {name: f"{ADAPTERS}/{name}/{LORA_FILE}" for name in self.names}
        commands = gguf_adapter_commands(f"{BASE}/{self.form.file}", files)
        precision = f"{self.form.quantization}, adapters in float32"
        ServingFile.of("gguf-lora", precision, commands, run.template).write(self.path)


@dataclass(frozen=True)
class GgufAdapterEntry(Gguf):
    """Open one adapter of a GgufAdaptersFolder over the file beside it. It implements `ExportFormat`.

    Attributes:
        over: the folder with the base's file.
    """

    over: Path

    @property
    def name(self) -> str:
        """Return the name of the export."""
        return f"gguf-lora over {self.quantization}"

    @contextmanager
    def open(self, folder: Path, device: torch.device, compute: torch.dtype) -> Iterator[LlamaCppModel]:
        """Load the base's file with llama.cpp on the CPU, and the adapter in `folder` over it."""
        self.require_packages("xllamacpp")
        from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel  # its package is optional

        with LlamaCppModel.load(self.over / self.file, folder / LORA_FILE) as model:
            yield model
