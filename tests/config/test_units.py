import pytest

from lorafit.config.foreign_text import at_least, at_most, size_in_words
from lorafit.hardware.device import GIB


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (300 << 20, "300.0 MiB"), (8 * GIB, "8.0 GiB"),
        (2000 * GIB, "2,000.0 GiB"),
    ],
)  # fmt: skip
def test_a_size_is_said_in_the_unit_that_leaves_a_number(size_bytes, words):
    assert size_in_words(size_bytes) == at_least(size_bytes) == at_most(size_bytes) == words


@pytest.mark.parametrize("there", [6.17, 6.2, 8.0, 23.5])
def test_what_is_needed_never_reads_like_the_little_less_that_is_there(there):
    assert float(at_least(there * GIB + 1e6).split()[0]) > float(at_most(there * GIB).split()[0])


@pytest.mark.parametrize("tenths", range(10, 200))
def test_a_budget_is_said_as_it_was_set(tenths):
    assert at_most(int(tenths / 10 * GIB)) == at_least(int(tenths / 10 * GIB)) == f"{tenths / 10:.1f} GiB"
