"""Reasoning that stands as text in an answer, between tags or before a closing one."""

from __future__ import annotations

TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
)
"""How models and data sets write reasoning into a text; the first pair is DeepSeek R1's and the most common."""
RARE_TAGS = (("<reasoning>", "</reasoning>"), ("<scratchpad>", "</scratchpad>"), ("<analysis>", "</analysis>"))
"""Tags that may be meant as a form of the answer: they are told, and left."""
CHANNELS = (
    *("[THINK]", "<|channel|>", "<|channel>", "<|START_THINKING|>", "<seed:think>", "◁think▷", "<|inner_prefix|>"),
    *("<|begin_of_thought|>", "<think>"),
)
"""What chat templates put before reasoning that they write."""
HINTS = ("think", "thought", "<reasoning>", "<scratchpad>", "<analysis>")
"""A text without any of these, in small letters, holds no tag."""


def split_thought(content: str, tags: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """Return (reasoning, answer) of a text that begins with one tagged thought; None for any other text.

    Servers whose prompt ends with the opening tag return a thought without it: the closing tag alone ends one too.
    """
    lowered = content.lower()
    if len(lowered) != len(content):
        lowered = content  # a letter whose small form is longer: places would differ
    for opening, closing in ((one.lower(), other.lower()) for one, other in tags):
        if lowered.count(closing) != 1 or lowered.count(opening) > 1:
            continue
        end, start = lowered.index(closing), lowered.find(opening)
        if start > end or content[: max(start, 0)].strip():
            continue
        begin = 0 if start < 0 else start + len(opening)
        return content[begin:end].strip(), content[end + len(closing) :].strip()
    return None


def tags_in(content: str, tags: tuple[tuple[str, str], ...]) -> bool:
    """Return True if a text holds one of the tags, or one that only some data sets use."""
    lowered = content.lower()
    return any(tag.lower() in lowered for pair in (*tags, *RARE_TAGS) for tag in pair)
