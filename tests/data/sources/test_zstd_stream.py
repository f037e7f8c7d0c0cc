"""zstd streams: whole ones read whole, cut ones never taken for whole."""

import io
import random

import pytest
import zstandard

from lorafit.data.sources.files import ZstdStream

ROWS = b"".join(b'{"n": %d}\n' % random.Random(0).randrange(10**9) for _ in range(1)) + bytes(
    random.Random(1).choices(b"abcdefgh\n", k=400_000)
)


def read_all(packed: bytes, size: int = 5000) -> bytes:
    stream = ZstdStream(io.BytesIO(packed))
    return b"".join(iter(lambda: stream.read(size), b""))


@pytest.mark.parametrize("parts", [1, 3])
def test_frames_come_back_as_they_were_packed(parts: int) -> None:
    step = -(-len(ROWS) // parts)
    packed = b"".join(zstandard.compress(ROWS[i : i + step]) for i in range(0, len(ROWS), step))
    assert read_all(packed) == ROWS


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_a_cut_stream_is_an_error_wherever_it_was_cut(share: float) -> None:
    packed = zstandard.compress(ROWS)
    with pytest.raises(EOFError, match="never ends"):
        read_all(packed[: int(len(packed) * share)])


def test_a_stream_cut_between_blocks_is_an_error() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    head = packer.compress(ROWS) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(EOFError):
        read_all(head)


def test_nothing_is_nothing() -> None:
    assert read_all(b"") == b""
    assert read_all(zstandard.compress(b"")) == b""
