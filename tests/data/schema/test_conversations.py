"""Conversations cut at their turns: every exchange that fits is taught once, none is cut inside."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.schema.records import Record, Turn, split_at_turns, up_to_last_answer


def conversation(*lengths: int) -> Record:
    turns = []
    for place, length in enumerate(lengths):
        turns += [Turn("user", f"q{place}"), Turn("assistant", "x" * length)]
    return Record(tuple(turns), "x:1", "sys")


def lengths_of(records: Sequence[Record]) -> list[int]:
    return [sum(len(turn.content) for turn in record.turns) for record in records]


def split(record: Record, limit: int) -> tuple[list[Record], int]:
    pieces, lost = split_at_turns(record, lengths_of, lambda length: length <= limit)
    return [piece for piece, _ in pieces], lost


def test_pieces_take_as_many_exchanges_as_fit_and_keep_the_system_text() -> None:
    pieces, lost = split(conversation(10, 10, 10), 30)
    assert [[turn.content for turn in piece.turns] for piece in pieces] == [
        ["q0", "x" * 10, "q1", "x" * 10],
        ["q2", "x" * 10],
    ]
    assert {piece.system for piece in pieces} == {"sys"}
    assert lost == 0


def test_an_exchange_too_long_by_itself_is_left_out_and_counted() -> None:
    pieces, lost = split(conversation(5, 50, 5), 20)
    assert len(pieces) == 2
    assert lost == 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(5, 60))
def test_every_exchange_stands_in_one_piece_or_is_too_long(lengths: list[int], limit: int) -> None:
    pieces, lost = split(conversation(*lengths), limit)
    asked = [turn.content for piece in pieces for turn in piece.turns if turn.role == "user"]
    fitting = [f"q{place}" for place, length in enumerate(lengths) if length + 2 <= limit]
    assert asked == fitting
    assert lost == len(lengths) - len(fitting)
    assert all(length <= limit for length in lengths_of(pieces))


def test_turns_before_the_first_user_stay_with_it_or_are_left() -> None:
    record = Record((Turn("assistant", "hello"), Turn("user", "a"), Turn("assistant", "b")), "x:1")
    pieces, _ = split(record, 2)
    assert [[turn.content for turn in piece.turns] for piece in pieces] == [["a", "b"]]


def test_what_follows_the_last_answer_is_left_out() -> None:
    record = Record((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")), "x:1")
    assert up_to_last_answer(record).response == "b"
    whole = conversation(3)
    assert up_to_last_answer(whole) is whole
