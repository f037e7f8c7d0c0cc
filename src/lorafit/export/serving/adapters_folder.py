"""AdaptersFolder: one base with the adapters of several runs, as vLLM serves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lorafit.backbone import fresh_weights, load_whole, rounding_activations
from lorafit.config import RunConfig, base_folder, read_json
from lorafit.errors import AdapterError, UsageError
from lorafit.export.adapter import write_origin
from lorafit.export.companions import write_companions
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import ExportFormat, OpenedModel, Safetensors, TransformersModel
from lorafit.export.serving.serving_file import Command, ServingFile
from lorafit.export.verify import Serving, write_chat_template
from lorafit.findings import Finding
from lorafit.methods import method_of
from lorafit.methods.lora import INITIAL_FILE
from lorafit.runs import write_text

BASE, ADAPTERS, IDENTITY = "base", "adapters", "base.json"
SETTINGS, SCRIPT = "serving.yaml", "vllm.sh"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for --max-lora-rank."""
MOST_AT_ONCE = 32
"""Most adapters that vLLM keeps on the GPU at once, unless serving.yaml is edited."""
SHARED = {
    "fingerprint": "base", "quantization": "quantization", "template": "chat template", "file": "file of the base",
}  # fmt: skip
"""What the adapters of a folder have in common: keys of base.json, and their names."""
SCRIPT_TEXT = """#!/bin/sh
# Serve the base and every adapter with vLLM. Arguments are passed on, such as --port 8001.
cd "$(dirname "$0")" && exec vllm serve --config serving.yaml "$@"
"""


@dataclass(frozen=True)
class AdaptersFolder:
    """Hold the paths of a folder that serves several adapters over one base.

    `base/` has the weights that the adapters were trained over, in bf16: the NF4 base dequantized, written once. For a
    16-bit base it has the tokenizer alone, and points to the checkpoint. `adapters/NAME/` is PEFT's format.
    """

    path: Path

    @property
    def base(self) -> Path:
        return self.path / BASE

    @property
    def identity(self) -> Path:
        """Fingerprint, quantization and template of the base, which every adapter must share."""
        return self.base / IDENTITY

    def adapter(self, name: str) -> Path:
        return self.path / ADAPTERS / name

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters in order."""
        found = (self.path / ADAPTERS).glob("*/adapter_config.json")
        return sorted(path.parent.name for path in found if not path.parent.name.startswith("."))

    def require_same_base(self, identity: dict[str, Any]) -> None:
        """Raise UsageError unless the folder holds the base and template of `identity`."""
        if not self.identity.is_file():
            what = "the folder is no export with --to adapter"
            raise UsageError(what, where=str(self.path), fix="choose another --out")
        held = read_json(self.identity, AdapterError, fix="export the runs again")
        for key, words in SHARED.items():
            if held.get(key) != identity.get(key):
                what = f"the {words} of this run is not the one that the folder's adapters share"
                raise UsageError(what, where=str(self.path), fix="choose another --out")

    def write_base(self, run: FinishedRun, identity: dict[str, Any]) -> list[Finding]:
        """Write `base/`, and return findings about its prompt."""
        self.base.mkdir()
        form = Safetensors()
        write_companions(run, self.base, form.dtype)
        if run.config.quantization != "none":
            form.write(base_weights(run.config), self.base)
        self.write_identity(identity)
        return write_chat_template(run, self.base)

    def identity_of(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Return what every adapter of the folder must share, beside fingerprint, quantization and template."""
        return identity

    def write_identity(self, identity: dict[str, Any]) -> None:
        """Write base.json."""
        write_text(self.identity, json.dumps(identity, indent=2) + "\n")

    def write_adapter(self, run: FinishedRun, staged: Path) -> None:
        """Write the adapter of `run` to `staged`."""
        copy_adapter(run.adapter, staged)

    def write_card(self, run: FinishedRun, staged: Path) -> None:
        """Write lineage and model card to `staged`, where the copied ones are of other weights."""
        lineage = run.lineage()
        if lineage is not None and run.weights.step is not None:
            write_origin(staged, run.config, lineage)

    def entry(self, run: FinishedRun) -> ExportFormat:
        """Return the format that opens one adapter over the base beside it."""
        return AdapterEntry.of(run, self)

    def serving_of(self, run: FinishedRun, name: str, staged: Path) -> Serving | None:
        """Return how vLLM serves the adapter in `staged`, which may not have its place in the folder yet."""
        rank = int(read_json(staged / "adapter_config.json", AdapterError)["r"])
        modules = {"lora-modules": [f"{name}={staged.resolve()}"]}
        return Serving(vllm_settings({name: rank}, self._weights(run)) | modules, self.path, name)

    def write_settings(self, run: FinishedRun) -> None:
        """Write serving.yaml, vllm.sh and serving.json for the adapters that the folder holds."""
        configs = {name: read_json(self.adapter(name) / "adapter_config.json", AdapterError) for name in self.names}
        settings = vllm_settings({name: int(config["r"]) for name, config in configs.items()}, self._weights(run))
        write_text(self.path / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        write_text(self.path / SCRIPT, SCRIPT_TEXT)
        (self.path / SCRIPT).chmod(0o755)
        command = Command("vLLM", "sh vllm.sh")
        ServingFile.of("adapter", "bfloat16", (command,), run.template).write(self.path)

    def _weights(self, run: FinishedRun) -> str:
        """Return the model that the adapters sit on, seen from the folder."""
        if run.config.quantization != "none":
            return BASE
        local = Path(run.config.base)
        return str(local.resolve()) if local.is_dir() else run.config.base


@dataclass(frozen=True)
class AdapterEntry(Safetensors):
    """Open one adapter of an AdaptersFolder over the base beside it. It implements `ExportFormat`.

    Attributes:
        config: the run's settings.
        over: the folder with the base's weights.
    """

    config: RunConfig | None = None
    over: Path | None = None
    name = "adapter"
    library_name = "peft"

    @classmethod
    def of(cls, run: FinishedRun, folder: AdaptersFolder) -> AdapterEntry:
        """Return the entry of `run` in `folder`."""
        has_weights = run.config.quantization != "none"
        over = folder.base if has_weights else base_folder(run.config.base, run.config.revision, weights=True)
        return cls(config=run.config, over=over)

    @contextmanager
    def open(self, folder: Path, device: torch.device, compute: torch.dtype) -> Iterator[OpenedModel]:
        """Load the base with transformers, and the adapter in `folder` over it with PEFT."""
        assert self.config is not None and self.over is not None
        dtype = self.dtype if compute is self.dtype else torch.float32
        model = load_whole(self.over, dtype=dtype).to(device)
        tuned = method_of(self.config).load(model, folder, self.config).eval()
        if dtype is self.dtype:
            yield TransformersModel(tuned)
        else:
            with rounding_activations(tuned, self.dtype) as rounded:
                yield TransformersModel(rounded)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy the adapter in `source` into the folder `target`, with the shared base in place of the training machine's.

    The base's path is as seen from the export's folder, in which vllm.sh runs.
    """
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(INITIAL_FILE))
    path = target / "adapter_config.json"
    config = read_json(path, AdapterError, fix="train the run again")
    path.write_text(json.dumps(config | {"base_model_name_or_path": BASE}, indent=2) + "\n", encoding="utf-8")


def vllm_settings(ranks: dict[str, int], model: str) -> dict[str, Any]:
    """Return vLLM's settings for adapters of these `ranks` by name, over `model`.

    vLLM takes certain maximal ranks only, and answers 500 to an adapter above the one that it started with. Raises
    UsageError for a rank that it cannot serve.
    """
    most = max(ranks.values())
    if most > RANKS[-1]:
        raise UsageError(f"vLLM serves ranks up to {RANKS[-1]}, not {most}", where="--to", fix="use --to merged")
    settings: dict[str, Any] = {"model": model, "served-model-name": [BASE]}
    if model != BASE:
        settings |= {"tokenizer": BASE, "generation-config": BASE, "chat-template": f"{BASE}/chat_template.jinja"}
    return settings | {
        "dtype": "bfloat16",
        "override-generation-config": '{"temperature": 0.0}',
        "enable-lora": True,
        "max-lora-rank": next(rank for rank in RANKS if rank >= most),
        "max-loras": min(len(ranks), MOST_AT_ONCE),
        "max-cpu-loras": max(len(ranks), MOST_AT_ONCE),
        "lora-modules": [f"{name}={ADAPTERS}/{name}" for name in sorted(ranks)],
    }


def base_weights(config: RunConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (stored name, tensor) of the base that adapters were trained over, floating-point ones in fp32."""
    for fresh in fresh_weights(config, "original" if config.quantization == "none" else "quantized"):
        tensor = fresh.tensor
        yield from fresh.parts(tensor.float() if tensor.is_floating_point() else tensor).items()
