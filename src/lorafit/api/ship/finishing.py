"""finishing: prove a written export in its program, and say how it is served."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer

from lorafit.data import Record
from lorafit.export import ExportFormat, Verification
from lorafit.export.finished_run import FinishedRun, Golden
from lorafit.export.formats import OwnTokenizer, Row, Safetensors
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
    check_own_tokenizer,
    prove_in_vllm,
    record_proofs,
)
from lorafit.findings import Finding

ANSWERED_ROWS = 20
NAME = "export"
"""The model's name in a vLLM that proves it."""
NOT_ASKED = "export the run with --verify-in vllm"
IN_OLLAMA = "it takes the same file; install it, and compare its answers"
ENGINES = {"transformers": "transformers", "peft": "transformers with PEFT", "gguf": "llama.cpp"}
"""The program that `ExportFormat.open` asks, by the format's `library_name`."""


class Proved(NamedTuple):
    """Hold the verdict of each program, and findings about the export's prompts."""

    proofs: list[EngineProof]
    findings: list[Finding]


@dataclass(frozen=True)
class Finishing:
    """Hold the parts of a run that prove its exports. All are compared with the same live model.

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
    _known: list[LiveAnswers] = field(default_factory=list, init=False, repr=False)

    def finish(self, staged: Path, live: nn.Module, form: ExportFormat, verification: Verification) -> Proved:
        """Prove the export in `staged`; verdicts, serving.json and a Modelfile are written too."""
        files = sorted(staged.glob("*.gguf"))
        dtype = str(form.dtype).removeprefix("torch.")
        is_merged = isinstance(form, Safetensors)  # transformers, vLLM and SGLang load no other format
        serving = Serving(merged_settings(dtype) | {"served-model-name": NAME}, staged, NAME) if is_merged else None
        proved = self.prove(staged, live, form, verification, serving)
        record_proofs(staged, proved.proofs)
        if files:
            self.write_modelfile(staged, files[0].name)
        commands = merged_commands(dtype) if is_merged else ()
        if files:
            commands = gguf_commands(files[0].name, self.run.folder.name.lower())
        name = "merged" if is_merged else form.name
        precision = form.name.removeprefix("gguf-") if files else dtype
        ServingFile.of(name, precision, commands, self.run.template).write(staged)
        return proved

    def write_modelfile(self, folder: Path, file: str, adapter: str | None = None) -> None:
        """Write Ollama's Modelfile of the GGUF `file`, with the LoRA file `adapter` over it, to `folder`."""
        prompts = [golden.messages for golden in self._conversations]
        text = modelfile(file, self.run.template, prompts, adapter)
        (folder / MODELFILE).write_text(text, encoding="utf-8")

    def prove(
        self,
        folder: Path,
        live: nn.Module,
        form: ExportFormat,
        verification: Verification,
        serving: Serving | None = None,
    ) -> Proved:
        """Compare prompt ids and greedy answers of the export in `folder` with the live model's.

        `verification` has the comparison of probabilities in the same program. `serving` says how vLLM serves it.
        """
        asked, conversations = self._asked, self._conversations
        found, findings = self._prompt_ids(folder, form, conversations)
        trained = [each.ids for each in conversations]
        prompts = Prompts.of(found, trained)
        expected = self._live_answers(live)
        weight = next(live.parameters())
        with form.open(folder, weight.device, getattr(torch, verification.live_dtype)) as served:
            answers = expected.compare(served)
        proofs = [EngineProof.of(_engine_of(form), prompts, verification, answers)]
        if serving is None:
            in_ollama = [EngineProof.absent("Ollama", IN_OLLAMA)] if form.library_name == "gguf" else []
            return Proved([*proofs, *in_ollama], findings)
        if not self.asks_vllm:
            return Proved([*proofs, EngineProof.absent("vLLM", NOT_ASKED)], findings)
        messages = [each.messages for each in conversations]
        subjects = Subjects(messages, trained, [row.prompt for row in asked], expected, self.rows)
        return Proved([*proofs, prove_in_vllm(serving, subjects, live, verification)], findings)

    def _live_answers(self, live: nn.Module) -> LiveAnswers:
        """Return the live model's greedy answers, which are computed once."""
        if not self._known:
            self._known.append(LiveAnswers.of(live, self._asked, self.run.template))
        return self._known[0]

    def _prompt_ids(
        self, folder: Path, form: ExportFormat, prompts: Sequence[Golden]
    ) -> tuple[list[list[int]], list[Finding]]:
        """Return the ids of prompts, rendered by the template in `folder`, as the format's program tokenizes them."""
        if isinstance(form, OwnTokenizer):
            return check_own_tokenizer(self.run, folder, form, prompts)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        rendered = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        texts = [str(rendered(each.messages)) for each in prompts]
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], []

    @property
    def _conversations(self) -> list[Golden]:
        """Return the golden prompts and those of held-out rows, with their ids in training."""
        template = self.run.template
        return [*self.run.golden, *(Golden(row.prompt, template.prompt_ids(row.prompt)) for row in self._asked)]

    @property
    def _asked(self) -> list[Record]:
        rows = [row for row in self.records if not row.is_document and not row.tools]
        return rows[:ANSWERED_ROWS]


def _engine_of(form: ExportFormat) -> str:
    return ENGINES.get(form.library_name, form.library_name)
