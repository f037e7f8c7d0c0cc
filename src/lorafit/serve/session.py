"""Session: a finished run loaded to answer, with or without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lorafit.backbone import require_same_base
from lorafit.config import RunConfig, base_folder, sampling_settings, served_stop_ids
from lorafit.data import Template, TextTokenizer
from lorafit.errors import UsageError
from lorafit.runs import LAST, ChosenWeights, RunDir, choose_weights
from lorafit.serve.engine import Engine, InProcessEngine, MergedEngine, require_embedded

TUNED = "tuned"
"""Name of the run's own adapter in the engine."""


class Session:
    """Hold an engine with the run's base and adapter, and the run's template."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        engine: Engine,
        template: Template,
        weights: ChosenWeights | None = None,
    ) -> None:
        self.run, self.config, self.engine, self.template = run, config, engine, template
        self.weights = weights
        """The run's weights that answer; None for a merged model."""
        base = base_folder(config.base, config.revision)
        self.stop_ids = served_stop_ids(template.stop_ids, base)
        self.left_out = sampling_settings(base)
        """Settings of the base's generation_config.json that `answer` does not apply."""

    @classmethod
    def load(cls, path: Path, *, device: str | None = None, checkpoint: str = LAST) -> Session:
        """Load the run in `path`, with the weights of `checkpoint`: last, best or a step.

        The template's golden prompts are asserted, so that prompts are as in training; base and adapter must be the
        trained ones. Raises RunDirError, BackboneError, AdapterError, TemplateError or VerificationError.
        """
        run = RunDir.open(path)
        weights = choose_weights(run, checkpoint)
        config = run.config()
        template = Template.load(run.template, TextTokenizer.from_base(config.base, config.revision))
        require_same_base(base_folder(config.base, config.revision, weights=True), run.base_fingerprint())
        engine = InProcessEngine(config, device)
        engine.add_adapter(TUNED, weights.folder)
        return cls(run, config, engine, template, weights)

    @classmethod
    def load_merged(cls, path: Path, *, device: str | None = None) -> Session:
        """Load the merged model in `path`, as a server would. Raises BackboneError."""
        template = Template.for_tokenizer(TextTokenizer.from_base(str(path)))
        return cls(RunDir(path), RunConfig(base=str(path)), MergedEngine(path, device), template)

    @property
    def is_merged(self) -> bool:
        """Return True if the session has no base to answer with."""
        return isinstance(self.engine, MergedEngine)

    def answering(self, *, tuned: bool = True) -> AbstractContextManager[Any]:
        """Yield the model that answers within the block: tuned, or the base alone."""
        return self.engine.answering(TUNED if tuned else None)

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        tuned: bool = True,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Return the answer to a conversation, or to a text as its only turn.

        With `tuned=False` the base answers the same prompt. `on_text` receives the answer piece by piece as it is
        generated. The answer ends at the model's last position. Raises UsageError for an invalid conversation, for one
        that leaves no position for an answer, and for a token without a row in the base's embedding table.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise UsageError(
                "the conversation has no messages", where="messages", fix='pass [{"role": "user", "content": "…"}]'
            )
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}", where="answer", fix="ask for at least one token")
        prompt = self.template.prompt_ids([dict(message) for message in messages])
        require_embedded(prompt, self.engine.vocabulary, self.template.tokenizer)
        max_new_tokens = min(max_new_tokens, self._free_positions(prompt))
        stream = _TextStream(self.template.tokenizer, on_text) if on_text else None
        ids = self.engine.generate(
            prompt,
            adapter=TUNED if tuned else None,
            stop_ids=self.stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_token=stream.add if stream else None,
        )
        return self.template.tokenizer.decode(ids)

    def _free_positions(self, prompt: Sequence[int]) -> int:
        """Return the positions of the model that `prompt` leaves free. Raises UsageError if none is left."""
        most = self.engine.max_positions
        if len(prompt) >= most:
            raise UsageError(
                f"the conversation takes {len(prompt):,} tokens, but the base has {most:,} positions",
                where="messages",
                fix="shorten it, or start a new one",
            )
        return most - len(prompt)


class _TextStream:
    """Decode a growing answer, and pass on only new and complete characters."""

    def __init__(self, tokenizer: TextTokenizer, on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.startswith(self.shown) and not text.endswith("�"):
            self.on_text(text[len(self.shown) :])
            self.shown = text
