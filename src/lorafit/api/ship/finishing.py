"""finishing: prove a written export in its program, and say how it is served."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer

from lorafit.data import Record
from lorafit.export import ExportFormat, Verification
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import OwnTokenizer
from lorafit.export.serving import MODELFILE, ServingFile, gguf_commands, merged_commands, modelfile
from lorafit.export.verify import EngineProof, LiveAnswers, Prompts, record_proofs

ANSWERED_ROWS = 20
ENGINES = {"transformers": "transformers", "peft": "transformers with PEFT", "gguf": "llama.cpp"}
"""The program that `ExportFormat.open` asks, by the format's `library_name`."""


@dataclass(frozen=True)
class Finishing:
    """Hold the parts of a run that prove its exports.

    Attributes:
        run: the run.
        records: held-out rows that the run kept.
    """

    run: FinishedRun
    records: Sequence[Record]

    def finish(
        self, staged: Path, live: nn.Module, form: ExportFormat, verification: Verification
    ) -> list[EngineProof]:
        """Prove the export in `staged`, and return the verdicts; they, serving.json and a Modelfile are written too."""
        proofs = self.prove(staged, live, form, verification)
        record_proofs(staged, proofs)
        files = sorted(staged.glob("*.gguf"))
        if files:
            prompts = [golden.messages for golden in self.run.golden] + [row.prompt for row in self._asked]
            text = modelfile(files[0].name, self.run.template, prompts)
            (staged / MODELFILE).write_text(text, encoding="utf-8")
        dtype = str(form.dtype).removeprefix("torch.")
        commands = gguf_commands(files[0].name, self.run.folder.name.lower()) if files else merged_commands(dtype)
        name = "merged" if form.library_name == "transformers" else form.name
        precision = form.name.removeprefix("gguf-") if files else dtype
        ServingFile.of(name, precision, commands, self.run.template).write(staged)
        return proofs

    def prove(self, folder: Path, live: nn.Module, form: ExportFormat, verification: Verification) -> list[EngineProof]:
        """Compare prompt ids and greedy answers of the export in `folder` with the live model's.

        `verification` has the comparison of probabilities in the same program.
        """
        asked, template = self._asked, self.run.template
        trained = [golden.ids for golden in self.run.golden] + [template.prompt_ids(row.prompt) for row in asked]
        conversations = [golden.messages for golden in self.run.golden] + [row.prompt for row in asked]
        prompts = Prompts.of(prompt_ids(folder, form, conversations), trained)
        expected = LiveAnswers.of(live, asked, template)
        weight = next(live.parameters())
        with form.open(folder, weight.device, getattr(torch, verification.live_dtype)) as served:
            answers = expected.compare(served)
        engine = ENGINES.get(form.library_name, form.library_name)
        return [EngineProof.of(engine, prompts, verification, answers), *_absent(form)]

    @property
    def _asked(self) -> list[Record]:
        rows = [row for row in self.records if not row.is_document and not row.tools]
        return rows[:ANSWERED_ROWS]


def prompt_ids(folder: Path, form: ExportFormat, conversations: Sequence[list[dict[str, object]]]) -> list[list[int]]:
    """Return the ids of prompts, rendered by the template in `folder`, and tokenized as the format's program does."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    texts = [
        str(tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False)) for each in conversations
    ]
    if isinstance(form, OwnTokenizer):
        return form.tokenize(folder, texts)
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _absent(form: ExportFormat) -> list[EngineProof]:
    """Return the verdicts for programs that serve the format and were not asked."""
    if form.library_name == "gguf":
        return [EngineProof.absent("Ollama", "it takes the same file; install it, and compare its answers")]
    asked = "serve the folder, and compare its answers with lorafit chat"
    installed = importlib.util.find_spec("vllm") is not None
    return [EngineProof.absent("vLLM", asked if installed else f"pip install vllm, {asked}")]
