"""bitsandbytes import: bitsandbytes, imported once with its warnings redirected.

On some CPUs bitsandbytes warns while it is imported.
"""

from __future__ import annotations

from lorafit.backbone.library_logging import redirect_library_logs

with redirect_library_logs():
    import bitsandbytes
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

__all__ = ["Linear4bit", "Params4bit", "QuantState", "bitsandbytes"]
