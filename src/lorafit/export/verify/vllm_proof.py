"""vllm_proof: an export opened by vLLM, and compared with the live model there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit.errors import ProgramError
from lorafit.export.formats import Row
from lorafit.export.verify.answers import LiveAnswers
from lorafit.export.verify.engines import EngineProof, Prompts
from lorafit.export.verify.served_model import ServedModel, told_of
from lorafit.export.verify.verification import Verification, verified_in
from lorafit.programs import VLLM_VARIABLE, find_vllm, vllm_program

ENGINE = "vLLM"
START_S = 900.0
"""Most seconds of vLLM's start; on a CPU with two cores it takes two minutes."""
MOST_ROWS = 20
SPARE_TOKENS = 8
GPU_SHARE = 0.8
"""Share of the GPU's free memory that vLLM gets beside the live model."""
ABSENT = f"pip install vllm in an environment of its own, set {VLLM_VARIABLE} to its program, and export again"


@dataclass(frozen=True)
class Serving:
    """Hold how vLLM serves an export.

    Attributes:
        settings: its flags and their values, those that the export's own files have.
        folder: the folder in which it runs.
        model: the name that requests use.
    """

    settings: Mapping[str, Any]
    folder: Path
    model: str


@dataclass(frozen=True)
class Subjects:
    """Hold the questions for an export, and the live model's answers.

    Attributes:
        conversations: golden conversations, and prompts of held-out rows.
        trained: the ids of these prompts in training.
        asked: the prompts of held-out rows alone, which `answers` has answers to.
        answers: the live model's greedy answers.
        rows: held-out rows with their supervised tokens.
    """

    conversations: Sequence[list[dict[str, Any]]]
    trained: Sequence[Sequence[int]]
    asked: Sequence[list[dict[str, Any]]]
    answers: LiveAnswers
    rows: Sequence[Row]

    @property
    def longest(self) -> int:
        """Return the most tokens of a text that is asked about."""
        prompts = max((len(ids) for ids in self.trained), default=0) + self.answers.max_new_tokens
        return max([prompts, *(len(row.ids) for row in self.rows)]) + SPARE_TOKENS


def prove_in_vllm(serving: Serving, subjects: Subjects, live: nn.Module, verification: Verification) -> EngineProof:
    """Return the verdict of vLLM; "not proved" if it is not installed or does not start.

    Prompts, probabilities and greedy answers are asked through its own routes, as clients do. `verification` has floor
    and base.
    """
    program = find_vllm()
    if program is None:
        return EngineProof.absent(ENGINE, ABSENT)
    weight: Any = live.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary = int(live.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**serving.settings, **_of_proof(subjects, weight.device, vocabulary)}
        running = vllm_program(
            program, settings, serving.folder, Path(scratch) / "vllm.log", on_gpu=weight.device.type == "cuda"
        )
        try:
            running.start()
            running.wait_until_healthy(START_S)
            return _judged(ServedModel(running.url, serving.model, vocabulary), subjects, live, verification)
        except ProgramError as error:
            return EngineProof.absent(ENGINE, error.what)
        finally:
            running.stop()


def _of_proof(subjects: Subjects, device: torch.device, vocabulary: int) -> dict[str, Any]:
    """Return settings for a short life: they change what vLLM keeps and how fast it starts, and no answer."""
    own: dict[str, Any] = {
        "max-model-len": subjects.longest,
        "max-num-seqs": 8,
        "max-logprobs": told_of(vocabulary),
        "enforce-eager": True,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        own["gpu-memory-utilization"] = round(GPU_SHARE * free / total, 3)
    return own


def _judged(served: ServedModel, subjects: Subjects, live: nn.Module, verification: Verification) -> EngineProof:
    prompts = Prompts.of([served.prompt_ids(each) for each in subjects.conversations], subjects.trained)
    most = subjects.answers.max_new_tokens
    answers = subjects.answers.compare_texts([served.answer(messages, most) for messages in subjects.asked])
    return EngineProof.of(ENGINE, prompts, verified_in(served, verification, live, subjects.rows[:MOST_ROWS]), answers)
