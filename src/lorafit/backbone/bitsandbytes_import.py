"""bitsandbytes, imported once and in silence: on some CPUs it warns while it is imported."""

from __future__ import annotations

from lorafit.backbone.library_logging import redirect_library_logs

with redirect_library_logs():
    import bitsandbytes
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

__all__ = ["Linear4bit", "Params4bit", "QuantState", "bitsandbytes"]
