"""Engine: a model of this process that generates, one conversation at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lorafit.backbone import load_backbone, load_whole
from lorafit.config import RunConfig
from lorafit.data import TextTokenizer
from lorafit.data.sources.raw_row import excerpt
from lorafit.engine import generate
from lorafit.errors import BackboneError, UsageError
from lorafit.methods import method_of


def require_embedded(prompt: Sequence[int], vocabulary: int, tokenizer: TextTokenizer) -> None:
    """Raise UsageError if `prompt` has an id that is beyond the `vocabulary` rows of the base's embedding table."""
    if (token := max(prompt, default=0)) < vocabulary:
        return
    text = excerpt(tokenizer.token_of(token) or "", 30)
    what = f"the token '{text}' has the id {token:,}, and the base's embedding table has {vocabulary:,} rows"
    raise UsageError(what, where="messages", fix="take it out of the text")


class Engine:
    """Generate with `model`, which a subclass loads."""

    model: Any

    @property
    def max_positions(self) -> int:
        """Return the number of positions that the base supports."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)

    @property
    def vocabulary(self) -> int:
        """Return the rows of the base's embedding table."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def answering(self, adapter: str | None) -> AbstractContextManager[Any]:
        """Yield the model that answers as `adapter` within the block; None is the base."""
        raise NotImplementedError

    def generate(
        self,
        prompt: Sequence[int],
        *,
        adapter: str | None,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Return the new token ids after `prompt`, without the stop token.

        `on_token` receives each token as it comes. `adapter` names the adapter that answers; None is the base. Raises
        UsageError for an unknown adapter.
        """
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        with self.answering(adapter) as model:
            (ids,) = generate(model, [prompt], stop_ids, on_token=on_token, **options)
        return ids


class InProcessEngine(Engine):
    """Run one conversation at a time in this process, with one adapter on the base."""

    def __init__(self, config: RunConfig, device: str | None = None) -> None:
        """Load the base of `config`. Raises BackboneError."""
        self.config, self.method = config, method_of(config)
        self.model = load_backbone(config, device=device, exact=True).eval()
        self.adapter: str | None = None

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[Any]:
        """Yield the model that answers as `adapter` within the block; None is the base."""
        if adapter is not None:
            self._require(adapter)
        is_base = adapter is None and self.adapter is not None
        with self.method.without(self.model) if is_base else nullcontext():
            yield self.model

    def add_adapter(self, name: str, folder: Path) -> None:
        """Add the trained weights in `folder`. Raises UsageError while another adapter is loaded."""
        if self.adapter is not None:
            fix = f"remove {self.adapter} first"
            raise UsageError(f"this engine holds one adapter and already has {self.adapter}", where=name, fix=fix)
        self.model = self.method.load(self.model, folder, self.config).eval()
        self.adapter = name

    def remove_adapter(self, name: str) -> None:
        """Remove the adapter called `name`. Raises UsageError if it does not exist."""
        self._require(name)
        self.model, self.adapter = self.method.detach(self.model), None

    def _require(self, name: str) -> None:
        if name != self.adapter:
            raise UsageError("no adapter of this name is loaded", where=name, fix="add it first")


class MergedEngine(Engine):
    """Run a merged model in this process. It answers as the tuned model and has no base."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        """Load the model in `folder` with transformers, as a server would. Raises BackboneError."""
        self.folder = folder
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "auto" if target.startswith("cuda") else torch.float32
        try:
            model = load_whole(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = f"the model cannot be loaded ({str(error)[:200]})"
            raise BackboneError(reason, where=str(folder), fix="merge the run again") from error
        self.model = model.to(target).eval()

    @contextmanager
    def answering(self, adapter: str | None) -> Iterator[Any]:
        """Yield the model. Raises UsageError without an `adapter`, since a merged model has no base."""
        if adapter is None:
            raise UsageError("a merged model has no base to answer", where=str(self.folder), fix="load the run")
        yield self.model
