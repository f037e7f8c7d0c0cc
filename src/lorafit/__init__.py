"""lorafit fine-tunes language models with LoRA over a frozen 4-bit base, and proves what it made."""

__version__ = "0.1.0"
