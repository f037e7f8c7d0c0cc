"""peft, imported once and in silence: it imports bitsandbytes, which warns on some CPUs."""

from __future__ import annotations

from lorafit.backbone import redirect_library_logs

with redirect_library_logs():
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "PeftModel",
    "PeftModelForCausalLM",
    "get_peft_model_state_dict",
]
