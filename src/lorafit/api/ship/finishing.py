"""finishing: prove a written export in its program, and say how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from lorafit.data import Record
from lorafit.export import ExportFormat, Verification
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import OwnTokenizer, Row
from lorafit.export.serving import (
    MODELFILE,
    ServingFile,
    gguf_commands,
    merged_commands,
    merged_settings,
    modelfile,
)
from lorafit.export.verify import (
    EngineProof,
    LiveAnswers,
    Prompts,
    Serving,
    Subjects,
    prove_in_vllm,
    record_proofs,
)

ANSWERED_ROWS = 20
NAME = "export"
"""The model's name in a vLLM that proves it."""
NOT_ASKED = "export the run with --verify-in vllm"
IN_OLLAMA = "it takes the same file; install it, and compare its answers"
ENGINES = {"transformers": "transformers", "peft": "transformers with PEFT", "gguf": "llama.cpp"}
"""The program that `ExportFormat.open` asks, by the format's `library_name`."""


@dataclass(frozen=True)
class Finishing:
    """Hold the parts of a run that prove its exports.

    Attributes:
        run: the run.
        records: held-out rows that the run kept.
        rows: the same rows, tokenized.
        asks_vllm: True to open the export in vLLM too, where it is installed.
    """

    run: FinishedRun
    records: Sequence[Record]
    rows: Sequence[Row]
    asks_vllm: bool = False

    def finish(
        self, staged: Path, live: nn.Module, form: ExportFormat, verification: Verification
    ) -> list[EngineProof]:
        """Prove the export in `staged`, and return the verdicts; they, serving.json and a Modelfile are written too."""
        files = sorted(staged.glob("*.gguf"))
        dtype = str(form.dtype).removeprefix("torch.")
        serving = None if files else Serving(merged_settings(dtype) | {"served-model-name": NAME}, staged, NAME)
        proofs = self.prove(staged, live, form, verification, serving)
        record_proofs(staged, proofs)
        if files:
            prompts = [golden.messages for golden in self.run.golden] + [row.prompt for row in self._asked]
            text = modelfile(files[0].name, self.run.template, prompts)
            (staged / MODELFILE).write_text(text, encoding="utf-8")
        commands = gguf_commands(files[0].name, self.run.folder.name.lower()) if files else merged_commands(dtype)
        name = "merged" if form.library_name == "transformers" else form.name
        precision = form.name.removeprefix("gguf-") if files else dtype
        ServingFile.of(name, precision, commands, self.run.template).write(staged)
        return proofs

    def prove(
        self,
        folder: Path,
        live: nn.Module,
        form: ExportFormat,
        verification: Verification,
        serving: Serving | None = None,
    ) -> list[EngineProof]:
        """Compare prompt ids and greedy answers of the export in `folder` with the live model's.

        `verification` has the comparison of probabilities in the same program. `serving` says how vLLM serves it.
        """
        asked, template = self._asked, self.run.template
        trained = [golden.ids for golden in self.run.golden] + [template.prompt_ids(row.prompt) for row in asked]
        conversations = [golden.messages for golden in self.run.golden] + [row.prompt for row in asked]
        prompts = Prompts.of(prompt_ids(folder, form, conversations), trained)
        expected = LiveAnswers.of(live, asked, template)
        weight = next(live.parameters())
        with form.open(folder, weight.device, getattr(torch, verification.live_dtype)) as served:
            answers = expected.compare(served)
        proofs = [EngineProof.of(_engine_of(form), prompts, verification, answers)]
        if serving is None:
            return [*proofs, EngineProof.absent("Ollama", IN_OLLAMA)]
        if not self.asks_vllm:
            return [*proofs, EngineProof.absent("vLLM", NOT_ASKED)]
        subjects = Subjects(conversations, trained, [row.prompt for row in asked], expected, self.rows)
        return [*proofs, prove_in_vllm(serving, subjects, live, verification)]

    @property
    def _asked(self) -> list[Record]:
        rows = [row for row in self.records if not row.is_document and not row.tools]
        return rows[:ANSWERED_ROWS]


def _engine_of(form: ExportFormat) -> str:
    return ENGINES.get(form.library_name, form.library_name)


def prompt_ids(folder: Path, form: ExportFormat, conversations: Sequence[list[dict[str, object]]]) -> list[list[int]]:
    """Return the ids of prompts, rendered by the template in `folder`, and tokenized as the format's program does."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [
        str(tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False)) for each in conversations
    ]
    if isinstance(form, OwnTokenizer):
        return form.tokenize(folder, texts)
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
