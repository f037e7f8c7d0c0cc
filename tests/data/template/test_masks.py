"""For every template and any text: what is supervised is the assistant's text and its stop token, and nothing else."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import made_tokenizers as made
from lorafit.data.schema.records import Record, Turn
from lorafit.data.template.layout import NOT_PREFIX_STABLE
from lorafit.data.template.template import STOP_MISSING, STRADDLED, Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer

letters = st.characters(exclude_categories=["Cs"])
MARKERS = [
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<end_of_turn>",
    "<|end|>",
    "<|im_start|>assistant\n",
    "<think>",
    "</think>",
]
contents = st.one_of(
    st.text(letters, max_size=40),
    st.text("aé \n\r\t<|>{}`", max_size=20),
    st.lists(st.sampled_from([*MARKERS, "the", " ", "\n", "é"]), max_size=6).map("".join),
)
conversations = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


def said(family: str, content: str, is_last: bool) -> str:
    """What the template of `family` shows of an answer, by its own source."""
    content = content.replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if family in ("llama3", "gemma", "mistral"):
        content = content.strip()
    if family == "qwen3":
        thought = ""
        if "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        return f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{content.lstrip(chr(10))}" if is_last else content
    return content


STOPS = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "fallback": "</s>"}
OPENINGS = {"mistral": " "}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    home = tmp_path_factory.mktemp("families")
    found = {family: made.family_folder(home / family, family) for family in made.FAMILIES}
    found["fallback"] = made.special_folder(home / "fallback", made.byte_level(), eos_token="</s>")
    return {name: Template.for_tokenizer(TextTokenizer.from_folder(folder)) for name, folder in found.items()}


def record(turns: list[tuple[str, str]]) -> Record:
    flat = [Turn(role, text) for asked, answer in turns for role, text in (("user", asked), ("assistant", answer))]
    return Record(tuple(flat), "rows.jsonl:1")


@pytest.mark.parametrize("family", [*made.FAMILIES, "fallback"])
@settings(max_examples=60)
@given(turns=conversations)
@example(turns=[("Hi", "<|im_end|>")])
@example(turns=[("Hi", "\n the")])
@example(turns=[("", "")])
def test_exactly_the_answers_and_their_stop_tokens_are_supervised(
    family: str, turns: list[tuple[str, str]], templates: dict[str, Template]
) -> None:
    template = templates[family]
    encoded = template.encode(record(turns))
    stop, opening = STOPS.get(family, "<|im_end|>"), OPENINGS.get(family, "")
    answers = [
        opening + said(family, answer, place == len(turns) - 1) + stop for place, (_, answer) in enumerate(turns)
    ]
    if NOT_PREFIX_STABLE in encoded.problems:
        assert family == "qwen3" and len(turns) > 1
        answers = answers[-1:]
    shown = template.tokenizer.decode(
        [token for token, kept in zip(encoded.ids, encoded.mask) if kept], skip_special_tokens=False
    )
    assert STOP_MISSING not in encoded.problems
    if STRADDLED not in encoded.problems:
        assert shown == "".join(answers)
    else:
        assert is_subsequence(shown, "".join(answers))


def is_subsequence(part: str, whole: str) -> bool:
    letters_left = iter(whole)
    # a token cut in the middle of a letter decodes to the replacement sign
    return all(letter in letters_left for letter in part if letter != "\ufffd")


@pytest.mark.parametrize("family", [*made.FAMILIES, "fallback"])
def test_no_prompt_character_is_supervised_when_a_token_covers_both(
    family: str, templates: dict[str, Template]
) -> None:
    template = templates[family]
    encoded = template.encode(record([("the", "\nthe")]))
    text = template.render(record([("the", "\nthe")]).messages())
    encoding = template.tokenizer.encodings([text])[0]
    starts = [start for (start, _), kept in zip(encoding.offsets, encoded.mask) if kept]
    prompt = template.prompt_text([{"role": "user", "content": "the"}])
    assert text.startswith(prompt) and min(starts) >= len(prompt)
    assert (STRADDLED in encoded.problems) == any(start < len(prompt) < end for start, end in encoding.offsets)
