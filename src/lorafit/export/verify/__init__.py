"""verify: compare an export, opened from disk, with the live model, and check its prompt."""

from lorafit.export.verify.answers import Answers, LiveAnswers
from lorafit.export.verify.comparison import Reference
from lorafit.export.verify.engines import EngineProof, Prompts, record_proofs
from lorafit.export.verify.precisions import NF4, PrecisionRow, Precisions, of_the_quantized, reason_for
from lorafit.export.verify.prompt_check import check_own_tokenizer, write_chat_template
from lorafit.export.verify.verification import VERIFICATION_FILE, Verification, verify
from lorafit.export.verify.vllm_proof import Serving, Subjects, prove_in_vllm

__all__ = [
    "NF4",
    "VERIFICATION_FILE",
    "Answers",
    "EngineProof",
    "LiveAnswers",
    "PrecisionRow",
    "Precisions",
    "Prompts",
    "Reference",
    "Serving",
    "Subjects",
    "Verification",
    "check_own_tokenizer",
    "of_the_quantized",
    "prove_in_vllm",
    "reason_for",
    "record_proofs",
    "verify",
    "write_chat_template",
]
