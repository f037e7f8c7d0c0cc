"""gguf: files for llama.cpp, Ollama and LM Studio, written with the `gguf` package and opened by llama.cpp itself."""

from lorafit.export.formats.gguf.gguf_format import GGUF_FORMATS, Gguf

__all__ = ["GGUF_FORMATS", "Gguf"]
