"""The proof of an export: the artefact, opened from disk, beside the live model; and the prompt it is asked with."""

from lorafit.export.verify.prompt_check import write_chat_template
from lorafit.export.verify.verification import VERIFICATION_FILE, Verification, verify

__all__ = ["VERIFICATION_FILE", "Verification", "verify", "write_chat_template"]
