"""BatchDecoder: one frozen model that continues many texts at once, each with its own adapter.

A decoding step has the shapes of a few buckets (rows, span) and reads its inputs from buffers that stay in place, so
that it is one CUDA graph. The tokens that it chooses stay on the device, and the next step can start from them before
the host has read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorafit.backbone import FrozenLinear4bit, multiply_packed
from lorafit.engine import padded_logits, use_plain_attention
from lorafit.errors import BackboneError, UsageError
from lorafit.methods.lora import GroupedAdapters
from lorafit.serve.decoding.fused import fuse_norms, one_rotation, rotating_modules, store_kernel, use_slot_attention
from lorafit.serve.decoding.graphs import DecodeGraphs
from lorafit.serve.decoding.slot_cache import Places, SlotCache, StoreKernel, masks, span_for

PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens of prompts in one forward pass by device, so that a long prompt does not hold up running answers."""


@dataclass(frozen=True)
class Part:
    """Hold a part of a prompt: `ids` from position `start` of the text in `slot`."""

    slot: int
    ids: Sequence[int]
    start: int
    adapter: int


@dataclass(frozen=True)
class Tail:
    """Hold a text, of which the predictions from the token at `start` to the last one are compared."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class DecodedStep:
    """Hold a step on the device, which the host may read later.

    Attributes:
        logits: (slots in use and below, vocabulary), fp32, by slot; rows of other slots are meaningless. They are
            overwritten by the next step.
    """

    logits: Tensor
    _likeliest: Tensor
    _done: torch.cuda.Event | None

    def likeliest(self) -> list[int]:
        """Return the most likely token of each slot. It waits for the step, and for no later one."""
        if self._done is not None:
            self._done.synchronize()
        return [int(token) for token in self._likeliest.tolist()]


class BatchDecoder:
    """Hold a model, the keys and values of `slots` texts, and `adapters` adapters.

    Attributes:
        model: the frozen base, in evaluation mode.
        adapters: the adapters in memory.
        positions: most tokens of a text.
        slots: most texts at once.
        runs_ahead: True where a step may start before the one before is read: on a GPU.
    """

    def __init__(self, model: Any, *, slots: int, positions: int, adapters: int) -> None:
        """Take the memory of all slots. Raises BackboneError for families without plain attention."""
        self.model = model.eval()
        use_plain_attention(model)
        self.slots, self.positions = slots, positions
        self.adapters = GroupedAdapters(model, adapters + 1)  # and a spare one, for proofs
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self.runs_ahead = self.device.type == "cuda"
        self.prefill_tokens = PREFILL_TOKENS.get(self.device.type, PREFILL_TOKENS["cpu"])
        self._as_bool = model.config._attn_implementation == "sdpa"
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: SlotCache | None = None
        self._spare: SlotCache | None = None
        self._graphs = DecodeGraphs(self.device)
        self._fused = False
        self._rotating: list[ModuleType] = []
        self._store: StoreKernel | None = None
        # a step reads these in place; rows: token, position, write position, adapter, 1 if the token is known
        self._inputs = torch.zeros(5, slots, dtype=torch.int64, device=self.device)
        self._tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)
        # two of each: the copy of a step may not have run while the host fills the next one's
        pinned = {"pin_memory": self.device.type == "cuda"}
        self._host = [torch.zeros(5, slots, dtype=torch.int64, **pinned) for _ in range(2)]
        self._read = [torch.zeros(slots, dtype=torch.int64, **pinned) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    @property
    def cache(self) -> SlotCache:
        """Return the keys and values of all slots; their memory is taken at the first call."""
        if self._cache is None:
            self._cache = self._take_memory()
        return self._cache

    @property
    def replays(self) -> int:
        """Return the number of steps that were replayed as CUDA graphs."""
        return self._graphs.replays

    @property
    def graphs_failed(self) -> bool:
        """Return True if steps run without CUDA graphs: on a CPU, or after a failed recording."""
        return self._graphs.failed

    def forget(self) -> None:
        """Drop all keys and values. The next use takes fresh memory."""
        self._graphs.forget()
        self._cache = self._spare = None

    def fuse(self) -> None:
        """Let fewer kernels compute the same, once `plain_log_probs` has said what the family's own code computes."""
        if not self._fused:
            use_slot_attention(self.model)
            fuse_norms(self.model)
            multiply_packed(self.model)
            self._rotating, self._store = rotating_modules(self.model), store_kernel(self.device)
            self._graphs.forget()
            self._fused = True

    def keep_dense(self, spare_bytes: int) -> bool:
        """Dequantize the base once if that leaves `spare_bytes` of the GPU's memory; a step then reads it faster.

        Returns False if it does not fit, or if nothing is quantized.
        """
        linears = [module for module in self.model.modules() if isinstance(module, FrozenLinear4bit)]
        needed = sum(linear.dense_bytes() for linear in linears)
        if self.device.type != "cuda" or not linears or torch.cuda.mem_get_info(self.device)[0] < needed + spare_bytes:
            return False
        for linear in linears:
            linear.keep_dense()
        self._graphs.forget()
        return True

    @torch.inference_mode()
    def prefill(self, parts: Sequence[Part], cache: SlotCache | None = None) -> Tensor:
        """Read parts of prompts at once, into `cache` in place of the running texts' own.

        Returns the logits (parts, vocabulary) after the last token of each.
        """
        cache = cache or self.cache
        lengths = [len(part.ids) for part in parts]
        longest = max(lengths)
        padded = [[*part.ids, *[0] * (longest - len(part.ids))] for part in parts]
        tokens = torch.tensor(padded, device=self.device)
        along = torch.arange(longest, device=self.device)
        positions = torch.tensor([part.start for part in parts], device=self.device)[:, None] + along
        sizes = torch.tensor(lengths, device=self.device)
        # the last position of a slot is scratch
        writes = positions.masked_fill(along >= sizes[:, None], cache.positions)
        positions = positions.clamp(max=cache.positions - 1)
        index = torch.tensor([part.adapter for part in parts], device=self.device)
        span = span_for(max(part.start + len(part.ids) for part in parts), cache.positions)
        slots = torch.tensor([part.slot for part in parts], device=self.device)
        kept = sorted(set(lengths))
        places = Places(slots, writes, span)
        logits = self._forward(tokens, positions, index, places, [size - 1 for size in kept], cache)
        place = torch.tensor([kept.index(size) for size in lengths], device=self.device)
        return logits[torch.arange(len(parts), device=self.device), place].float()

    @torch.inference_mode()
    def decode(self, rows: Mapping[int, tuple[int | None, int, int]]) -> DecodedStep:
        """Start a step that reads one token of each row. `rows` maps a slot to (token, position, adapter).

        None is the token that the step before chose for the slot. Slots without a row write to scratch positions and
        use the base.
        """
        height = min(self.slots, 1 << max(rows).bit_length())
        self._turn ^= 1
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()  # else the copy of an earlier step would read this one's inputs
        columns = [[0, 0, self.positions, 0, 1]] * self.slots
        for slot, (token, position, adapter) in rows.items():
            columns[slot] = [token or 0, position, position, adapter, int(token is not None)]
        self._inputs.copy_(self._host[self._turn].copy_(torch.tensor(columns).mT), non_blocking=True)
        self._copied[self._turn] = self._event()
        longest = max(position for _, position, _ in rows.values()) + 1
        span = span_for(longest, self.positions)
        self.cache  # noqa: B018 (its memory is taken outside of a recording)
        logits, tokens = self._graphs.run((height, span), self.adapters.version, lambda: self._step(height, span))
        self._tokens[:height].copy_(tokens)
        if self.device.type != "cuda":
            return DecodedStep(logits, tokens, None)
        read = self._read[self._turn][:height]
        read.copy_(tokens, non_blocking=True)
        return DecodedStep(logits, read, self._event())

    def _event(self) -> torch.cuda.Event | None:
        """Return an event that marks this moment of the device's work; None on a CPU, which works at once."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _step(self, height: int, span: int) -> tuple[Tensor, Tensor]:
        """Run the forward pass of a bucket on the buffers: what a CUDA graph holds. Returns (logits, likeliest).

        It can run twice: it changes nothing that it reads.
        """
        given, positions, writes, index, known = self._inputs[:, :height]
        tokens = torch.where(known > 0, given, self._tokens[:height])
        places = Places(range(height), writes[:, None], span, self._store)
        with one_rotation(self._rotating):
            logits = self._forward(tokens[:, None], positions[:, None], index, places, [0], self.cache)[:, 0].float()
        return logits, logits.argmax(-1)

    def _forward(
        self, tokens: Tensor, positions: Tensor, index: Tensor, places: Places, kept: Sequence[int], cache: SlotCache
    ) -> Tensor:
        """Return the logits (rows, kept, vocabulary) after the tokens (rows, tokens) at the places `kept`."""
        mask = masks(self.model.config, positions, places.span, self.dtype, as_bool=self._as_bool)
        last = list(kept) == [tokens.shape[1] - 1]
        keep: Any = 1 if last else torch.tensor(kept, device=self.device)
        with self.adapters.rows(index):
            out = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache.at(places),
                use_cache=True,
                **({"logits_to_keep": keep} if self._keeps else {}),
            )
        logits: Tensor = out.logits
        if self._keeps:
            return logits
        return logits[:, -1:] if last else logits[:, keep]

    @torch.inference_mode()
    def plain_log_probs(
        self, tails: Sequence[Tail], around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> list[Tensor]:
        """Return log-probabilities (tokens - start, vocabulary) of each tail, without cache or slots.

        One forward pass reads all of them, padded on the right, within `around()`. It is the reference for what the
        slots compute.
        """
        with around():
            logits = padded_logits(self.model, [tail.ids for tail in tails])
        return [
            row[tail.start : len(tail.ids)].float().log_softmax(-1) for row, tail in zip(logits, tails, strict=True)
        ]

    def slot_log_probs(self, tail: Tail, slot: int, adapter: int) -> Tensor:
        """Return the same log-probabilities through `slot`, the tokens after `start` decoded one by one."""
        rows = [self.prefill([Part(slot, tail.ids[: tail.start + 1], 0, adapter)])[0]]
        for position in range(tail.start + 1, len(tail.ids)):
            rows.append(self.decode({slot: (tail.ids[position], position, adapter)}).logits[slot].clone())
        return torch.stack(rows).log_softmax(-1)

    def spare_log_probs(self, tails: Sequence[Tail], adapter: int) -> list[Tensor]:
        """Return the same log-probabilities through spare slots, which no text uses, all tails at once."""
        cache = self._spare_for(tails)
        found: list[list[Tensor]] = [[] for _ in tails]
        for step in range(max(len(tail.ids) - tail.start for tail in tails)):
            left = [row for row, tail in enumerate(tails) if tail.start + step < len(tail.ids)]
            parts = [_part_of(tails[row], row, step, adapter) for row in left]
            for row, logits in zip(left, self.prefill(parts, cache), strict=True):
                found[row].append(logits)
        return [torch.stack(rows).log_softmax(-1) for rows in found]

    def _spare_for(self, tails: Sequence[Tail]) -> SlotCache:
        positions = max(len(tail.ids) for tail in tails)
        if self._spare is None or len(tails) > self._spare.slots or positions > self._spare.positions:
            shapes = [(layer.keys, layer.values) for layer in self.cache.layers]
            with torch.inference_mode():
                self._spare = SlotCache(shapes, len(tails), positions)
        return self._spare

    def _take_memory(self) -> SlotCache:
        with torch.inference_mode():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
            made = self.model(input_ids=tokens, use_cache=True).past_key_values
        pairs = [(layer.keys, layer.values) for layer in getattr(made, "layers", ())]
        if not pairs or any(keys is None or keys.ndim != 4 for keys, _ in pairs):
            what = f"the builtin engine has no cache for {type(self.model).__name__}"
            raise BackboneError(what, fix="merge the run, and serve it with vLLM")
        try:
            return SlotCache(pairs, self.slots, self.positions)
        except RuntimeError as error:
            need = sum(t[0, :, 0].nbytes for pair in pairs for t in pair) * self.slots * self.positions
            what = f"{self.slots} texts of {self.positions:,} tokens need {need / 2**30:.1f} GiB of keys and values"
            raise UsageError(what, where="serve", fix="lower --max-model-len or --max-num-seqs") from error


def _part_of(tail: Tail, slot: int, step: int, adapter: int) -> Part:
    """Return what a slot reads at `step`: the text up to `start` first, and then a token at a time."""
    place = tail.start + step
    return Part(slot, [tail.ids[place]], place, adapter) if step else Part(slot, tail.ids[: place + 1], 0, adapter)
