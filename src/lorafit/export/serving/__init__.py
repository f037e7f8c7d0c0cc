"""serving: the files that say how an export is served: serving.json, vLLM's settings, Ollama's Modelfile."""

from lorafit.export.serving.adapters_folder import BASE, AdaptersFolder
from lorafit.export.serving.gguf_adapters_folder import LORA_FILE, GgufAdaptersFolder
from lorafit.export.serving.modelfile import MODELFILE, modelfile
from lorafit.export.serving.serving_file import (
    SERVING_FILE,
    ServingFile,
    gguf_commands,
    merged_commands,
    merged_settings,
)

__all__ = [
    "BASE",
    "LORA_FILE",
    "MODELFILE",
    "SERVING_FILE",
    "AdaptersFolder",
    "GgufAdaptersFolder",
    "ServingFile",
    "gguf_commands",
    "merged_commands",
    "merged_settings",
    "modelfile",
]
