"""verify: compare an export, opened from disk, with the live model, and check its prompt."""

from lorafit.export.verify.answers import Answers, LiveAnswers
from lorafit.export.verify.engines import EngineProof, Prompts, record_proofs
from lorafit.export.verify.prompt_check import check_own_tokenizer, write_chat_template
from lorafit.export.verify.verification import VERIFICATION_FILE, Verification, verify
from lorafit.export.verify.vllm_proof import Serving, Subjects, prove_in_vllm

__all__ = [
    "VERIFICATION_FILE",
    "Answers",
    "EngineProof",
    "LiveAnswers",
    "Prompts",
    "Serving",
    "Subjects",
    "Verification",
    "check_own_tokenizer",
    "prove_in_vllm",
    "record_proofs",
    "verify",
    "write_chat_template",
]
