"""choice: which engine serves a target, and the engine of an exported folder."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorafit.config import read_json
from lorafit.errors import AdapterError, UsageError
from lorafit.programs import VLLM_VARIABLE, Program, find_vllm, vllm_program
from lorafit.programs.llama_server import llama_program
from lorafit.runs import RunDir
from lorafit.serve.engines.exported_adapter import require_proof
from lorafit.serve.engines.supervised import ServedFolder, SupervisedEngine

SETTINGS, ADAPTERS, BASE = "serving.yaml", "adapters", "base"
LORA_FILES = f"{ADAPTERS}/*/lora-F32.gguf"
GREEDY = '{"temperature": 0.0}'
LONGEST = 4096
ENGINE_OF = {"run": "builtin", "adapters": "vllm", "merged": "vllm", "gguf": "llamacpp", "gguf-lora": "llamacpp"}
"""Engine by the kind of what is served."""
FIXES = {
    "builtin": "name runs, or take --engine vllm for an export",
    "vllm": "export the run with --to adapter or --to merged, and name that folder",
    "llamacpp": "export the run with --to gguf, and name that folder",
}


def engine_for(targets: Sequence[Path], wanted: str) -> str:
    """Return builtin, vllm or llamacpp: `wanted`, or with auto what serves the first of `targets`.

    Raises UsageError for targets that the engine does not serve.
    """
    kinds = [_kind_of(target) for target in targets]
    chosen = ENGINE_OF[kinds[0]] if wanted == "auto" else wanted
    if wrong := next((target for target, kind in zip(targets, kinds) if ENGINE_OF[kind] != chosen), None):
        raise UsageError(f"the engine {chosen} does not serve this", where=str(wrong), fix=FIXES[chosen])
    if chosen != "builtin" and len(targets) > 1:
        fix = "export the runs into one folder with --to adapter" if chosen == "vllm" else "start a server for each"
        raise UsageError(f"the engine {chosen} serves one folder", where="serve", fix=fix)
    return chosen


def supervised_engine(
    name: str,
    target: Path,
    log: Path | None,
    *,
    texts: int,
    tokens: int | None,
    adapter_dirs: Sequence[Path],
    on_gpu: bool,
    on_crash: Callable[[BaseException], None],
) -> SupervisedEngine:
    """Return the engine of the export in `target`, not started; the program writes to `log`, by default a new file.

    Raises UsageError if the program is not installed.
    """
    log = log or Path(tempfile.mkdtemp(prefix="lorafit-serve-")) / f"{name}.log"
    target = target.resolve()
    make, served = (
        _of_gguf(target, log, texts, tokens)
        if name == "llamacpp"
        else _of_vllm(target, log, texts, tokens, adapter_dirs, on_gpu)
    )
    return SupervisedEngine(make, served, on_crash)


def _kind_of(target: Path) -> str:
    if RunDir(target).holds_run:
        return "run"
    if target.suffix == ".gguf" or any(target.glob("*.gguf")):
        return "gguf"
    if any(target.glob(LORA_FILES)):
        return "gguf-lora"
    if (target / SETTINGS).is_file():
        return "adapters"
    return "merged" if (target / "config.json").is_file() else "run"


def _of_gguf(target: Path, log: Path, texts: int, tokens: int | None) -> tuple[Callable[[], Program], ServedFolder]:
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError("xllamacpp is not installed", where="--engine", fix="pip install 'lorafit[gguf]'")
    loras = {path.parent.name: path for path in sorted(target.glob(LORA_FILES))}
    if loras:
        file, served = min((target / BASE).glob("*.gguf")), _with_loras(loras)
        sizes = {"texts": texts, "tokens": tokens or LONGEST}
        return lambda: llama_program(file, BASE, log, **sizes, adapters=list(loras.values())), served
    file = target if target.suffix == ".gguf" else min(target.glob("*.gguf"))
    name = target.stem if target.suffix == ".gguf" else target.name
    return lambda: llama_program(file, name, log, texts=texts, tokens=tokens or LONGEST), ServedFolder(name)


def _with_loras(loras: Mapping[str, Path]) -> ServedFolder:
    folders = {name: path.parent for name, path in loras.items()}
    for folder in folders.values():
        require_proof(folder)
    return ServedFolder(BASE, folders, numbered=tuple(folders))


def _of_vllm(
    target: Path, log: Path, texts: int, tokens: int | None, adapter_dirs: Sequence[Path], on_gpu: bool
) -> tuple[Callable[[], Program], ServedFolder]:
    program = find_vllm()
    if program is None:
        own = f"pip install vllm in an environment of its own, and set {VLLM_VARIABLE} to its program"
        fix = f"{own}; or serve the run itself, which the builtin engine does"
        raise UsageError("vLLM is not installed", where="--engine", fix=fix)
    path = target / SETTINGS
    if path.is_file():
        settings: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        served = _adapters_of(target, settings, adapter_dirs)
    else:
        dtype = read_json(target / "config.json", AdapterError).get("dtype", "auto")
        settings = {"model": ".", "served-model-name": [target.name], "dtype": dtype}
        settings["override-generation-config"] = GREEDY
        served = ServedFolder(target.name)
    settings |= {"max-num-seqs": texts, "max-model-len": tokens}  # None leaves the length to vLLM
    if not on_gpu and shutil.which("nvidia-smi") is None:
        settings["enforce-eager"] = True  # compiling for a CPU takes minutes
    loads = bool(served.roots)
    return lambda: vllm_program(program, settings, target, log, on_gpu=on_gpu, loads_adapters=loads), served


def _adapters_of(target: Path, settings: dict[str, Any], adapter_dirs: Sequence[Path]) -> ServedFolder:
    modules = dict(each.split("=", 1) for each in settings.get("lora-modules", []))
    roots = (target / ADAPTERS, *(folder.resolve() for folder in adapter_dirs))
    return ServedFolder(
        base_name=settings.get("served-model-name", [BASE])[0],
        adapters={name: target / place for name, place in modules.items()},
        roots=roots,
        most_rank=int(settings.get("max-lora-rank", 16)),
        template=target / BASE / "chat_template.jinja",
    )
