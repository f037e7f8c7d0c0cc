"""rehearsed_layers: the decoder layers as this run will drive them, fitted to the card before the first step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorafit.config import Resolved, RunConfig, RunDir, Source, parse_bytes
from lorafit.config.dial import Dial
from lorafit.data import largest_step
from lorafit.engine import PAGE_BYTES, DecoderLayers, Graphs, MicroBatch, Rehearsal, Work, packed, rehearse
from lorafit.errors import RunDirError
from lorafit.planning.dial import dial_of
from lorafit.planning.micro_batch import most_tokens
from lorafit.planning.standing import ADAM_8BIT_BYTES, ADAM_BYTES
from lorafit.training import AllocatorWatch, LorafitTrainer, largest_micro_batch, largest_within, without_checkpointing

GRADIENT_BYTES = 4
AUTO = "auto"
CARD_SHARE = 0.97
"""Of the card's free memory, when no budget is set."""


@contextlib.contextmanager
def rehearsed_layers(trainer: LorafitTrainer, resolved: Resolved, run: RunDir) -> Iterator[Rehearsal | None]:
    """Within it the model's layers run as the dial says: solved and proved on a card, as it is written on a CPU.

    A run that goes on keeps the dial it had, so that its bits stay the same, unless it is asked for another. Yields
    what the rehearsal found.
    """
    config = resolved.config
    without_checkpointing(trainer.args)
    on_card = trainer.args.device.type == "cuda"
    layers = DecoderLayers(trainer.model, compiled=config.compile == "on" or (config.compile == "auto" and on_card))
    layers.tell = lambda text: trainer.events.record("eager_layers", trainer.state.global_step, text)
    layers.dial = dial_of(config, len(layers)) or Dial()
    if not on_card:
        trainer.layout.micro_tokens = layers.dial.micro_tokens or config.max_tokens
        with contextlib.nullcontext() if layers.dial == Dial() and not layers.compiled else layers:
            yield None
        return
    by_hand = resolved.sources.get("activations", Source.DEFAULT) not in (Source.PLAN, Source.DEFAULT)
    wish = _Wish.of(config, by_hand)
    before = _take_up(layers, wish, run)
    solves = wish.asked == AUTO and before is None
    work = _work(trainer, grows=solves)
    with packed(trainer.model):  # the backward passes too: what they recompute has to attend as the forward did
        found = rehearse(trainer.model, layers, work, budget_bytes(config), solves=solves)
    found = replace(found, dial=found.dial.sized(work.max_tokens, config.max_tokens))

    def write() -> None:
        now = {"dial": str(layers.dial), "schedule": layers.offload.schedule, "notes": layers.notes}
        run.write_json(run.engine, {**asdict(found), **now, **asdict(before or wish)})

    def write_if_possible() -> None:
        with contextlib.suppress(RunDirError):  # a full disk is no reason to stop here
            write()

    _drive(trainer, layers, found, write_if_possible)
    write()
    try:
        with layers:
            yield found
    finally:  # whatever comes after training needs the memory
        if trainer.graphs is not None:
            trainer.graphs.forget()
            trainer.graphs = None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What was asked of the dial: nothing (`auto`) or a setting by hand; the setting in force, the plan's where it is
    nobody else's; and the budget. Stands in engine.json, so that a run which goes on knows whether that changed."""

    asked: str
    planned: str
    vram: str | None

    @classmethod
    def of(cls, config: RunConfig, by_hand: bool) -> _Wish:
        checkpointing = config.gradient_checkpointing
        asked = AUTO if checkpointing == AUTO else f"gradient_checkpointing={checkpointing}"
        return cls(config.activations if by_hand else asked, config.activations, config.vram)

    def is_that_of(self, known: dict[str, Any]) -> bool:
        """Whether the run that wrote `known` was asked for the same. What the plan would choose today does not count:
        that moves with the memory that happens to be free."""
        if "planned" not in known:  # older releases wrote one word for both
            return self.asked == AUTO or known.get("asked", self.planned) == self.planned
        if self.asked == AUTO:
            return bool(known["asked"] == AUTO and known["vram"] == self.vram)
        return self.asked in (known["asked"], known["planned"])  # the run's own recipe has what the plan chose


def _take_up(layers: DecoderLayers, wish: _Wish, run: RunDir) -> _Wish | None:
    """Turn `layers` to the dial that a run which goes on has had, and return what was asked for then; None when it had
    none, or another is asked for now."""
    # one that a run left which never began is not this run's
    known = json.loads(run.engine.read_text()) if run.holds_run and run.engine.exists() else None
    if known is None or not wish.is_that_of(known):
        return None
    layers.dial = Dial.parse(known["dial"], len(layers))
    layers.follow(known["schedule"])
    return _Wish(known["asked"], known["planned"], known["vram"]) if "planned" in known else wish


def _drive(trainer: LorafitTrainer, layers: DecoderLayers, found: Rehearsal, turned: Callable[[], object]) -> None:
    """Have `trainer` lay steps out as the dial says that was found, and turn `layers` when its memory is short, upon
    which `turned` is called: a run that goes on begins with the dial that it ended with."""
    dial = layers.dial = found.dial
    trainer.layout.micro_tokens = dial.micro_tokens or trainer.config.max_tokens
    trainer.memory.layers = layers
    if dial.graphs:
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        longest = int(trainer.train_rows.lengths.max())
        trainer.graphs = Graphs(layers, longest, trained, arena_bytes=found.graph_bytes)
        trainer.graphs.tell = partial(_note_graphs, trainer)
        trainer.memory.give_back = trainer.graphs.give_back
    if not trainer.config.deterministic:  # when it acts depends on what the allocator went through
        trainer.add_callback(AllocatorWatch(layers, trainer.events, turned=turned))


def _note_graphs(trainer: LorafitTrainer, text: str) -> None:
    trainer.events.record("no_graphs", trainer.state.global_step, text)


def enforce_budget(config: RunConfig) -> None:
    """Nothing of this process takes more of the card than `vram`, from here on; before anything is loaded."""
    if torch.cuda.is_available() and config.vram is not None:
        _, total = torch.cuda.mem_get_info()
        limit = max(0, parse_bytes(config.vram, "vram") - PAGE_BYTES)  # what a block that grows may take beyond it
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def budget_bytes(config: RunConfig) -> int:
    """Bytes that the run may reserve on the card: `vram`, or nearly all that is free."""
    free, total = torch.cuda.mem_get_info()
    if config.vram is None:
        return int((free + torch.cuda.memory_reserved()) * CARD_SHARE)
    return min(parse_bytes(config.vram, "vram"), total)


def _work(trainer: LorafitTrainer, *, grows: bool = False) -> Work:
    """The run's micro-batches, of at most `max_tokens` where the dial does not say; `grows`: of up to a whole step."""
    config, rows = trainer.config, trainer.train_rows
    step = largest_step(rows.lengths, config.examples_per_step, config.seed, trainer.args.max_steps)
    step_tokens = int(rows.lengths[step].sum())
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    state = ADAM_BYTES if config.optimizer == "adamw" else ADAM_8BIT_BYTES

    def batch_of(micro_tokens: int) -> MicroBatch:
        return largest_micro_batch(rows, config, micro_tokens, step).to(trainer.args.device)

    def within(micro_tokens: int, limit: int) -> MicroBatch | None:
        batch = largest_within(rows, config, micro_tokens, limit, step)
        return batch and batch.to(trainer.args.device)

    def loss_of(batch: MicroBatch, share: Tensor | float) -> Tensor:
        trainer.model.train()
        # the Trainer's model computes under accelerate's autocast once it trains; other layers would be compiled, and
        # other bytes measured, without it
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss: Tensor = trainer.compute_loss(trainer.model, batch, share=share)
        return loss

    return Work(
        batch_of=batch_of,
        loss_of=loss_of,
        max_tokens=most_tokens(step_tokens, config.max_tokens) if grows else config.max_tokens,
        longest=int(rows.lengths.max()),
        step_tokens=float(rows.lengths.mean()) * min(config.examples_per_step, len(rows)),
        within=within,
        coming_bytes=round(trained * (GRADIENT_BYTES + state)),
    )
