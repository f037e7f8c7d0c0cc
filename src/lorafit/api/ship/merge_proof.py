"""merge_proof: measure a merge before it gets its name, and decide which base it is merged onto."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import nn

from lorafit.api.ship.finishing import Finishing
from lorafit.api.ship.importance import Weighing, weighed
from lorafit.backbone import base_fingerprint, is_packed_base, load_backbone
from lorafit.config import MergeBase, base_folder
from lorafit.errors import UsageError
from lorafit.export import DEFAULT_FORMAT, ExportFormat, Row, TransformersModel, Verification, verify
from lorafit.export.finished_run import FinishedRun
from lorafit.export.formats import Gguf
from lorafit.export.merge import requantized
from lorafit.export.verify import NF4, EngineProof, PrecisionRow, Precisions, Reference, of_the_quantized, reason_for
from lorafit.export.verify.precisions import AS_GOOD
from lorafit.findings import Finding
from lorafit.methods import method_of


class NotAsGood(Exception):
    """Another way to merge is better, and is tried next. Users never see this error."""


@dataclass
class MergeProof:
    """Measure merges of one run, one base after the other.

    Attributes:
        run: the run.
        rows: held-out rows, tokenized.
        finishing: proves the artefact in its program.
        onto: the base that the user chose; None to decide by measurement.
        base: the 16-bit model that takes the place of the run's base, if the user named one.
        measured: the rows of every base that was measured.
        weighing: a K-quant with and without an importance matrix; None for other formats.
    """

    run: FinishedRun
    rows: Sequence[Row]
    finishing: Finishing
    onto: MergeBase | None = None
    base: str | None = None
    measured: list[PrecisionRow] = field(default_factory=list)
    verification: Verification | None = None
    proofs: list[EngineProof] = field(default_factory=list)
    precisions: Precisions | None = None
    weighing: Weighing | None = None
    _known: Reference | None = None

    def candidates(self, form: ExportFormat) -> tuple[MergeBase, ...]:
        """Return the bases to try in order: the first that is as good is taken, else the last."""
        config = self.run.config
        if self.onto == "quantized" and self.base is not None:
            fix = "leave --base out, or write --onto original"
            raise UsageError("onto quantized takes the base of training, and no other", where="--base", fix=fix)
        if config.init_lora_weights == "loftq" and self.onto == "original":
            what = (
                "the run began with LoftQ, whose adapters restore what quantizing lost, and the original lost nothing"
            )
            raise UsageError(what, where="--onto", fix="write --onto quantized")
        if self.onto is not None:
            return (self.onto,)
        if config.quantization == "none":
            return ("original",)
        packed = is_packed_base(base_folder(config.base, config.revision))
        if form.name != DEFAULT_FORMAT or (packed and self.base is None) or config.init_lora_weights == "loftq":
            return ("quantized",)
        return ("original", "quantized")

    def prove(self, staged: Path, onto: MergeBase, form: ExportFormat) -> list[Finding]:
        """Verify the artefact in `staged`, and measure it in NF4. Returns findings about its prompts.

        Raises NotAsGood if another base is to be taken.
        """
        config, method = self.run.config, method_of(self.run.config)
        live = method.load(load_backbone(config, exact=True), self.run.adapter, config)
        reference = self._reference(live)
        measured = verify(
            live,
            staged,
            self.rows,
            onto,
            method=method,
            export_format=form,
            reference=reference,
            original=self._original(onto),
            earlier=self.verification,
        )
        if isinstance(form, Gguf) and form.importance and self.weighing is not None:
            self.weighing.with_it = measured.merged
            if not self.weighing.helps:
                raise NotAsGood
        self.proofs, findings = self.finishing.finish(staged, live, form, measured)
        self.verification = measured
        del live
        own = [PrecisionRow(onto, measured.merged_dtype, measured.merged), *self._in_nf4(staged, onto, form, reference)]
        if self.onto is None and onto == "original" and len(self.candidates(form)) > 1:
            self._decide(own, measured, reference)
        self.measured += own
        self.precisions = Precisions(onto, self._reason(onto, form), measured.live_loss, tuple(self.measured))
        weighing = {} if self.weighing is None else self.weighing.to_dict()
        self.precisions.record(staged, **self._named_base(onto), **weighing)
        return findings

    def weighed(self, form: Gguf, write: Callable[..., object]) -> Gguf:
        """Return `form` with an importance matrix, after `write` has measured the file without one.

        `write` is `merge` for this run and base; the file that it writes is not kept.
        """
        config = self.run.config
        live = method_of(config).load(load_backbone(config, exact=True), self.run.adapter, config)
        reference = self._reference(live)
        heavy, self.weighing = weighed(self.run, live, form)
        device, compute = next(live.parameters()).device, live.get_input_embeddings().weight.dtype  # type: ignore[operator]
        del live
        if heavy is form:
            return form

        def measure(staged: Path, onto: MergeBase, form: ExportFormat) -> NoReturn:
            assert self.weighing is not None
            with form.open(staged, device, compute) as artefact:
                self.weighing.without = reference.compare(artefact)
            raise NotAsGood

        with suppress(NotAsGood):
            write(export_format=form, prove=measure)
        return heavy

    def _reference(self, live: nn.Module) -> Reference:
        """Return the live model's probabilities, which are computed once."""
        if self._known is None:
            self._known = Reference.of(TransformersModel(live), [row for row in self.rows if len(row.predicting)])
        return self._known

    def _decide(self, own: list[PrecisionRow], measured: Verification, reference: Reference) -> None:
        """Add the rows of the quantized base if the original is chosen. Raises NotAsGood otherwise."""
        quantized = of_the_quantized(measured)
        failed = any(proof.status == "failed" for proof in self.proofs)
        if not measured.passed or failed or measured.merged.loss > quantized.measured.loss + AS_GOOD:
            self.measured += own
            raise NotAsGood
        config = self.run.config
        trained = method_of(config).trained_weights(self.run.adapter, config)
        again = reference.compare(TransformersModel(requantized(config, "quantized", trained)))
        self.measured += [quantized, PrecisionRow("quantized", NF4, again)]

    def _in_nf4(self, staged: Path, onto: MergeBase, form: ExportFormat, reference: Reference) -> list[PrecisionRow]:
        """Return the row of the artefact loaded in 4 bits, as `train` and `load_in_4bit` load it."""
        if form.name != DEFAULT_FORMAT or self.run.config.quantization == "none":
            return []
        config = self.run.config.model_copy(update={"base": str(staged), "revision": None})
        model: nn.Module = load_backbone(config, exact=True)
        return [PrecisionRow(onto, NF4, reference.compare(TransformersModel(model)))]

    def _original(self, onto: MergeBase) -> Path | None:
        """Return the folder of the base that a merge onto the original takes."""
        config = self.run.config
        if onto != "original":
            return None
        return base_folder(self.base or config.base, None if self.base else config.revision, weights=True)

    def _reason(self, onto: MergeBase, form: ExportFormat) -> str:
        if onto == "whole":
            return "every weight of the run, in the precision of the files"
        if self.onto is not None:
            return "as chosen"
        if self.run.config.quantization == "none":
            return "the run trained over it in 16 bits"
        if form.name != DEFAULT_FORMAT:
            own = "the model that was trained, in the format's own precision"
            return own if self.weighing is None else f"{own}, {self.weighing.sentence}"
        if self.run.config.init_lora_weights == "loftq":
            return "LoftQ's adapters restore what quantizing lost"
        bases = {row.onto for row in self.measured}
        return reason_for(onto, self.measured) if len(bases) > 1 else "the base exists in 4 bits only"

    def _named_base(self, onto: MergeBase) -> dict[str, dict[str, str]]:
        """Return name and hash of the base that the user named, for verification.json."""
        if self.base is None or onto != "original":
            return {}
        return {"onto_base": {"base": self.base, "sha256": base_fingerprint(base_folder(self.base, weights=True))}}
