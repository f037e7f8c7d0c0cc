"""modelfile: Ollama's Modelfile of a GGUF file, with a Go template only where it renders the trained prompt.

Source: https://docs.ollama.com/modelfile. Ollama does not run the Jinja template in a GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data import Template
from lorafit.data.template.layout import cleaned
from lorafit.errors import TemplateError

MODELFILE = "Modelfile"
MARKS = {"system": "«lorafit-s»", "user": "«lorafit-u»", "assistant": "«lorafit-a»"}
"""Contents that no template changes, by role."""
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Frames:
    """Hold the text before and after a content of each role, and the text that asks for an answer.

    Attributes:
        around: role -> (text before the content, text after it).
        asking: the text after the last turn of a prompt.
    """

    around: Mapping[str, tuple[str, str]]
    asking: str

    def render(self, messages: Messages) -> str:
        """Return the prompt as the Go template of `go_template` renders it."""
        parts = [self.around[str(each["role"])] for each in messages]
        said = [f"{before}{each['content']}{after}" for (before, after), each in zip(parts, messages, strict=True)]
        return "".join(said) + self.asking

    def go_template(self) -> str:
        """Return the template in Go's text/template language."""
        branches = [
            f'{{{{ {"if" if place == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for place, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.asking}"


def modelfile(file: str, template: Template, prompts: Sequence[Messages], adapter: str | None = None) -> str:
    """Return the Modelfile of the GGUF file called `file`, with the LoRA file `adapter` over it.

    `prompts` are conversations of the run. A TEMPLATE is written if it renders each of them as training did.
    """
    stops = [f'PARAMETER stop "{text}"' for text in template.stop_tokens if '"' not in text]
    adapters = [] if adapter is None else [f"ADAPTER ./{adapter}"]
    lines = [f"FROM {file if '/' in file else f'./{file}'}", *adapters, "PARAMETER temperature 0", *stops]
    frames = frames_of(template)
    proved = frames is not None and _is_proved(frames, template, prompts)
    if frames is None or not proved:
        lines.append("# no TEMPLATE: Ollama's template language does not render this run's prompts; use llama-server")
    else:
        lines.append(f'TEMPLATE """{frames.go_template()}"""')
    return "\n".join(lines) + "\n"


def frames_of(template: Template) -> Frames | None:
    """Return the frames of the template's roles; None if a turn is rendered depending on other turns."""
    around: dict[str, tuple[str, str]] = {}
    system, user, assistant = ({"role": role, "content": mark} for role, mark in MARKS.items())
    try:
        # an answer within a prompt, and not the last text of a row: some templates end its line only there
        whole = _without_bos(template, template.prompt_text([system, user, assistant, user]))
        asked = _without_bos(template, template.prompt_text([system, user]))
        cuts = [0, *(len(_without_bos(template, template.render(turns))) for turns in ([system], [system, user]))]
    except TemplateError:
        return None
    again = asked[cuts[1] :]  # the last turn and the question after it
    cuts.append(len(whole) - len(again))
    if not whole.endswith(again):
        return None
    for (role, mark), start, end in zip(MARKS.items(), cuts, cuts[1:]):
        pieces = whole[start:end].split(mark)
        if len(pieces) != 2:
            return None
        around[role] = (pieces[0], pieces[1])
    frames = Frames(around, asked[cuts[2] :])
    texts = [frames.asking, *(piece for pair in around.values() for piece in pair)]
    is_plain = not any(mark in text for text in texts for mark in ("{{", "}}", '"""'))
    return frames if is_plain else None


def _is_proved(frames: Frames, template: Template, prompts: Sequence[Messages]) -> bool:
    for messages in prompts:
        if any(message["role"] not in MARKS or not isinstance(message["content"], str) for message in messages):
            return False
        text = frames.render(cleaned(messages))
        if template.tokenizer.encode(text) != _ids_without_bos(template, template.prompt_ids(messages)):
            return False
    return bool(prompts)


def _without_bos(template: Template, text: str) -> str:
    # Ollama's runner adds the token if the GGUF file says so
    return text.removeprefix(template.tokenizer.bos_token or "") if template.tokenizer.adds_bos else text


def _ids_without_bos(template: Template, ids: list[int]) -> list[int]:
    return ids[1:] if template.tokenizer.adds_bos and ids[:1] == [template.tokenizer.bos_id] else ids
