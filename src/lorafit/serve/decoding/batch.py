"""BatchDecoder: one frozen model that continues many texts at once, each with its own adapter.

`decode` always has the shapes of a few buckets (rows, span), reads its inputs from buffers that stay in place, and
waits for the device once, for the chosen tokens. That is what a CUDA graph of it would need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lorafit.engine import use_plain_attention
from lorafit.errors import BackboneError, UsageError
from lorafit.methods.lora import GroupedAdapters
from lorafit.serve.decoding.slot_cache import Places, SlotCache, masks, span_for

PREFILL_TOKENS = 512
"""Tokens of a prompt in one forward pass, so that a long prompt does not hold up running answers."""


class BatchDecoder:
    """Hold a model, the keys and values of `slots` texts, and `adapters` adapters.

    Attributes:
        model: the frozen base, in evaluation mode.
        adapters: the adapters in memory.
        positions: most tokens of a text.
        slots: most texts at once.
    """

    def __init__(self, model: Any, *, slots: int, positions: int, adapters: int) -> None:
        """Take the memory of all slots. Raises BackboneError for families without plain attention."""
        self.model = model.eval()
        use_plain_attention(model)
        self.slots, self.positions = slots, positions
        self.adapters = GroupedAdapters(model, adapters + 1)  # and a spare one, for proofs
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        self._as_bool = model.config._attn_implementation == "sdpa"
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: SlotCache | None = None
        # decode reads these in place: token, position, write position and adapter of each slot
        self._inputs = torch.zeros(4, slots, dtype=torch.int64, device=self.device)
        self._host = torch.zeros(4, slots, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    @property
    def cache(self) -> SlotCache:
        """Return the keys and values of all slots; their memory is taken at the first call."""
        if self._cache is None:
            self._cache = self._take_memory()
        return self._cache

    def forget(self) -> None:
        """Drop all keys and values. The next use takes fresh memory."""
        self._cache = None

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int], start: int, adapter: int) -> Tensor:
        """Read `ids`, which stand at `start` of the text in `slot`. Returns the last token's logits (vocabulary,)."""
        tokens = torch.tensor([ids], device=self.device)
        positions = torch.arange(start, start + len(ids), device=self.device)[None]
        index = torch.full((1,), adapter, dtype=torch.int64, device=self.device)
        places = Places(range(slot, slot + 1), positions, span_for(start + len(ids), self.positions))
        return self._forward(tokens, positions, index, places)[0]

    @torch.inference_mode()
    def decode(self, rows: Mapping[int, tuple[int, int, int]]) -> Tensor:
        """Read one token of each row. `rows` maps a slot to (token, position, adapter).

        Returns logits (slots in use and below, vocabulary) by slot; rows of other slots are meaningless. Those slots
        write to scratch positions and use the base.
        """
        height = min(self.slots, 1 << max(rows).bit_length())
        host = self._host
        host[:3], host[2], host[3] = 0, self.positions, 0
        for slot, (token, position, adapter) in rows.items():
            host[0, slot], host[1, slot], host[2, slot], host[3, slot] = token, position, position, adapter
        self._inputs.copy_(host, non_blocking=True)
        longest = max(position for _, position, _ in rows.values()) + 1
        return self._decode(height, span_for(longest, self.positions))

    def _decode(self, height: int, span: int) -> Tensor:
        """Run the forward pass of a bucket on the buffers: the part that a CUDA graph would hold."""
        tokens, positions, writes, index = self._inputs[:, :height]
        return self._forward(tokens[:, None], positions[:, None], index, Places(range(height), writes[:, None], span))

    def _forward(self, tokens: Tensor, positions: Tensor, index: Tensor, places: Places) -> Tensor:
        mask = masks(self.model.config, positions, places.span, self.dtype, as_bool=self._as_bool)
        with self.adapters.rows(index):
            out = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache.at(places),
                use_cache=True,
                **({"logits_to_keep": 1} if self._last_only else {}),
            )
        return out.logits[:, -1].float()

    @torch.inference_mode()
    def plain_log_probs(
        self, ids: Sequence[int], start: int, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Tensor:
        """Return log-probabilities (tokens - start, vocabulary) of one forward pass without cache or slots.

        It is the reference for what the slots compute; the pass runs within `around()`.
        """
        tokens = torch.tensor([ids], device=self.device)
        with around():
            logits = self.model(input_ids=tokens, use_cache=False).logits
        return logits[0, start:].float().log_softmax(-1)

    def slot_log_probs(self, ids: Sequence[int], start: int, slot: int, adapter: int) -> Tensor:
        """Return the same log-probabilities through `slot`, the tokens after `start` decoded one by one."""
        rows = [self.prefill(slot, ids[: start + 1], 0, adapter)]
        for position in range(start + 1, len(ids)):
            rows.append(self.decode({slot: (ids[position], position, adapter)})[slot])
        return torch.stack(rows).log_softmax(-1)

    def spare_log_probs(self, ids: Sequence[int], start: int, adapter: int) -> Tensor:
        """Return the same log-probabilities through the spare slot, which no text uses."""
        rows = [self.prefill(self.slots, ids[: start + 1], 0, adapter)]
        rows += [self.prefill(self.slots, [ids[place]], place, adapter) for place in range(start + 1, len(ids))]
        return torch.stack(rows).log_softmax(-1)

    def _take_memory(self) -> SlotCache:
        with torch.inference_mode():
            tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
            made = self.model(input_ids=tokens, use_cache=True).past_key_values
        pairs = [(layer.keys, layer.values) for layer in getattr(made, "layers", ())]
        if not pairs or any(keys is None or keys.ndim != 4 for keys, _ in pairs):
            what = f"the builtin engine has no cache for {type(self.model).__name__}"
            raise BackboneError(what, fix="merge the run, and serve it with vLLM")
        try:
            return SlotCache(pairs, self.slots + 1, self.positions)  # and a spare one, for proofs
        except RuntimeError as error:
            need = sum(t[0, :, 0].nbytes for pair in pairs for t in pair) * self.slots * self.positions
            what = f"{self.slots} texts of {self.positions:,} tokens need {need / 2**30:.1f} GiB of keys and values"
            raise UsageError(what, where="serve", fix="lower --max-model-len or --max-num-seqs") from error
