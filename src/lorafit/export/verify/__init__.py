"""verify: compare an export, opened from disk, with the live model, and check its prompt."""

from lorafit.export.verify.prompt_check import check_own_tokenizer, write_chat_template
from lorafit.export.verify.verification import VERIFICATION_FILE, Verification, verify

__all__ = ["VERIFICATION_FILE", "Verification", "check_own_tokenizer", "verify", "write_chat_template"]
