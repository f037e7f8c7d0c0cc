"""serving: the files that say how an export is served: serving.json, vLLM's settings, Ollama's Modelfile."""

from lorafit.export.serving.adapters_folder import AdapterEntry, AdaptersFolder, copy_adapter
from lorafit.export.serving.modelfile import MODELFILE, modelfile
from lorafit.export.serving.serving_file import (
    SERVING_FILE,
    Command,
    ServingFile,
    gguf_commands,
    merged_commands,
    merged_settings,
)

__all__ = [
    "AdapterEntry",
    "AdaptersFolder",
    "Command",
    "MODELFILE",
    "SERVING_FILE",
    "ServingFile",
    "copy_adapter",
    "gguf_commands",
    "merged_commands",
    "merged_settings",
    "modelfile",
]
