"""Excerpts are safe to print."""

from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.sources.raw_row import excerpt


@given(st.text(alphabet=st.characters(), max_size=100))
def test_an_excerpt_is_one_printable_line_that_every_terminal_takes(text: str) -> None:
    shown = excerpt(text, 20)
    assert shown.isprintable()
    shown.encode()


def test_an_excerpt_is_cut_to_its_limit() -> None:
    assert excerpt("x" * 30, 10) == "x" * 9 + "…"
    assert excerpt("a\nb\x1b", 10) == "a⏎b\\x1b"
