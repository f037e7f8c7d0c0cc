"""Excerpts of data for messages: short, on one line, safe to print on any terminal."""

from __future__ import annotations


def excerpt(text: str, limit: int = 60) -> str:
    """`text` with line ends as ⏎, whatever cannot be printed escaped, and cut to `limit` characters."""
    cut = text[: limit + 1].replace("\r\n", "\n").replace("\n", "⏎")
    if not cut.isprintable():
        cut = "".join(char if char.isprintable() else _escaped(char) for char in cut)
    return cut if len(cut) <= limit else cut[: limit - 1] + "…"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
