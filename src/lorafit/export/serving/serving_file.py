"""ServingFile: serving.json, which says what serves an export, how, and how it was proved."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorafit.data import Template
from lorafit.runs import write_text

SERVING_FILE = "serving.json"
GREEDY = '{"temperature": 0.0}'
"""vLLM's override of generation settings. Without it a request that names no temperature is sampled at 1.0."""


@dataclass(frozen=True)
class Command:
    """Hold one way to serve an export.

    Attributes:
        engine: the program.
        command: the command line, run in the export's folder.
    """

    engine: str
    command: str


@dataclass(frozen=True)
class ServingFile:
    """Hold the content of serving.json.

    Attributes:
        export_format: merged, adapter, or the name of a GGUF format.
        precision: the precision that the export was proved in.
        commands: programs with their command lines, the proved one first.
        stop_ids: token ids that end an answer.
        stop: the texts of these ids.
        temperature: the temperature of the run's own answers.
        prompt: how a request becomes the trained prompt.
    """

    export_format: str
    precision: str
    commands: tuple[Command, ...]
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...]
    temperature: float = 0.0
    prompt: str = "send chat requests; rendered text sent to /completions gets a second beginning-of-text token"

    @classmethod
    def of(cls, export_format: str, precision: str, commands: tuple[Command, ...], template: Template) -> ServingFile:
        """Return the file of an export whose prompts `template` renders."""
        return cls(export_format, precision, commands, tuple(template.stop_ids), tuple(template.stop_tokens))

    def write(self, folder: Path) -> None:
        """Write serving.json to `folder`."""
        write_text(folder / SERVING_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def merged_settings(dtype: str) -> dict[str, Any]:
    """Return vLLM's settings for a folder of merged weights in `dtype`."""
    return {"model": ".", "dtype": dtype, "override-generation-config": GREEDY}


def merged_commands(dtype: str) -> tuple[Command, ...]:
    """Return the command lines for a folder of merged weights in `dtype`."""
    flags = [word for name, value in merged_settings(dtype).items() if name != "model" for word in (f"--{name}", value)]
    return (
        Command(
            "transformers", "python -c \"from transformers import pipeline; pipeline('text-generation', model='.')\""
        ),
        Command("vLLM", shlex.join(["vllm", "serve", ".", *flags])),
        Command("SGLang", f"python -m sglang.launch_server --model-path . --dtype {dtype}"),
    )


def gguf_adapter_commands(base: str, adapters: Mapping[str, str]) -> tuple[Command, ...]:
    """Return the command lines for adapter files over the file `base`; `adapters` maps names to files.

    llama.cpp adds every adapter that it is given, unless it is told not to: then a request names its own.
    """
    each = [f"llama-server --model {base} --lora {file} --jinja --temp 0" for file in adapters.values()]
    commands = [Command("llama.cpp", line) for line in each]
    if len(adapters) > 1:
        flags = " ".join(f"--lora {file}" for file in adapters.values())
        line = f"llama-server --model {base} {flags} --lora-init-without-apply --jinja --temp 0"
        numbers = ", ".join(f"{number} is {name}" for number, name in enumerate(adapters))
        ask = f'requests name theirs: "lora": [{{"id": 0, "scale": 1}}], where {numbers}'
        commands.append(Command("llama.cpp", f"{line}  # {ask}"))
    ollama = [
        f"(cd {file.rpartition('/')[0]} && ollama create {name.lower()} -f Modelfile)"
        for name, file in adapters.items()
    ]
    return (*commands, *(Command("Ollama", line) for line in ollama))


def gguf_commands(file: str, name: str) -> tuple[Command, ...]:
    """Return the command lines for the GGUF file called `file`; `name` is the model's in Ollama."""
    return (
        Command("llama.cpp", f"llama-server --model {file} --jinja --temp 0"),
        Command("Ollama", f"ollama create {name} -f Modelfile && ollama run {name}"),
    )
