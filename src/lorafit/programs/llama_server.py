"""llama_server: llama.cpp's HTTP server, from the package xllamacpp, in a process of its own.

`python -m lorafit.programs.llama_server FILE PORT NAME TEXTS TOKENS [LORA…]` serves until it is ended. A LoRA file is
added to the answers of requests that name its number.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from lorafit.programs.program import Program, free_port


def llama_program(
    file: Path, name: str, log: Path, *, texts: int, tokens: int, adapters: Sequence[Path] = ()
) -> Program:
    """Return llama.cpp's server of the GGUF file, not started: `texts` answers at once, of `tokens` tokens each.

    `adapters` are LoRA files over it, which requests name by their number.
    """
    port = free_port()
    # `lorafit` may be installed nowhere but on this process's path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [str(file.resolve()), str(port), name, str(texts), str(tokens), *(str(path.resolve()) for path in adapters)]
    command = [sys.executable, "-m", "lorafit.programs.llama_server", *words]
    return Program("llama.cpp", command, file.parent, port, log, environment)


def main() -> None:
    """Serve the file that the command line names."""
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server  # type: ignore[import-untyped]  # an extra

    file, port, name, texts, tokens, *adapters = sys.argv[1:]
    parameters = CommonParams()
    parameters.model.path = file
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = int(port)
    parameters.model_alias = {name}
    parameters.n_parallel = int(texts)
    parameters.n_ctx = int(texts) * int(tokens)
    parameters.use_jinja = True
    parameters.sampling.temp = 0.0
    parameters.lora_adapters = [CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    parameters.lora_init_without_apply = True  # else every answer has the sum of all
    server = Server(parameters)
    assert server.listening_address
    threading.Event().wait()


if __name__ == "__main__":
    main()
