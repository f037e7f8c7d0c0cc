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
CHANNELS = (
    *("[THINK]", "<|channel|>", "<|channel>", "<|START_THINKING|>", "<seed:think>", "◁think▷", "<|inner_prefix|>"),
    *("<|begin_of_thought|>", "<think>"),
)
"""What chat templates put before reasoning that they write."""
HINTS = ("think", "thought")
"""What every tag holds, in small letters."""


def split_thought(content: str, tags: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
    """Return (reasoning, answer) of a text that begins with one tagged thought; None for any other text.

    Servers whose prompt ends with the opening tag return a thought without it: the closing tag alone ends one too.
    """
    for opening, closing in tags:
        before, found, answer = content.partition(closing)
        if not found or opening in answer or closing in answer:
            continue
        lead, opened, thought = before.partition(opening)
        if not opened:
            return before.strip(), answer.strip()
        if not lead.strip() and opening not in thought:
            return thought.strip(), answer.strip()
    return None


def tags_in(content: str, tags: tuple[tuple[str, str], ...]) -> bool:
    """Return True if a text holds one of the tags."""
    return any(tag in content for pair in tags for tag in pair)
