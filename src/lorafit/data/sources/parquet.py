"""Rows of Parquet and Arrow files, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lorafit.config import one_line
from lorafit.data.sources.files import DataFile, reading, too_much_unpacked, unpacked
from lorafit.data.sources.raw_row import RawRow, excerpt
from lorafit.data.sources.tables import without_nulls
from lorafit.errors import DataError

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20


def parquet_rows(index: int, file: DataFile, max_unpacked: int, on_share: Callable[[float], None]) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file, numbered from 1. `on_share` receives the share that has been read.

    A text that stands in a dictionary page costs the file a byte for each row that repeats it. Texts are therefore
    read with their dictionary, and a batch is cut by what its rows take without one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(file), unpacked(file, max_unpacked) as stream:
        try:
            metadata = pq.read_metadata(stream)
            table = pq.ParquetFile(stream, metadata=metadata, read_dictionary=_texts(metadata))
            schema, line, size = metadata.schema.to_arrow_schema(), 0, 0
            _check_names(schema.names, file)
            for batch in table.iter_batches(batch_size=_batch_rows(metadata)):
                for part, part_bytes in _parts(batch):
                    size += part_bytes
                    if size > max_unpacked:
                        raise too_much_unpacked(file.name, max_unpacked)
                    for fields in _rows_of(part, schema):
                        line += 1
                        row_bytes = part_bytes // max(1, len(part))
                        yield RawRow(index, line, b"", without_nulls(fields), size_bytes=row_bytes)
                on_share(line / max(1, metadata.num_rows))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"is no readable Parquet file ({one_line(error)})", where=file.name, fix="write it again"
            ) from error


def arrow_rows(index: int, file: DataFile, max_unpacked: int, on_share: Callable[[float], None]) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file, as `datasets` saves them to disk, numbered from 1."""
    import pyarrow as pa

    with reading(file), unpacked(file, max_unpacked) as stream:
        try:
            size, line, unpacked_bytes = file.size_bytes, 0, 0
            for batch in _arrow_batches(stream):
                _check_names(batch.schema.names, file)
                unpacked_bytes += batch.nbytes
                if unpacked_bytes > max(max_unpacked, size):
                    raise too_much_unpacked(file.name, max_unpacked)
                for start in range(0, len(batch), BATCH_ROWS):
                    part = batch.slice(start, BATCH_ROWS)
                    row_bytes = part.nbytes // max(1, len(part))
                    for fields in part.to_pylist():
                        line += 1
                        yield RawRow(index, line, b"", without_nulls(fields), size_bytes=row_bytes)
                on_share(min(1.0, stream.tell() / max(1, size)))
        except (pa.ArrowException, UnicodeDecodeError) as error:
            what = f"is no readable Arrow file ({one_line(error)})"
            raise DataError(what, where=file.name, fix="save it again") from error


def _check_names(names: Sequence[str], file: DataFile) -> None:
    """Raise DataError for a table with two columns of one name, because a row could keep only one."""
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        what = f"the table has two columns named '{excerpt(str(twice), 30)}'"
        raise DataError(what, where=file.name, fix="rename one of the two, and write the file again")


def _arrow_batches(stream: Any) -> Iterator[Any]:
    """Yield the record batches of either format: a stream, as `datasets` writes, or a file with a footer."""
    import pyarrow as pa

    head = stream.read(6)
    stream.seek(0)
    if head == b"ARROW1":
        table = pa.ipc.open_file(stream)
        return (table.get_batch(number) for number in range(table.num_record_batches))
    return iter(pa.ipc.open_stream(stream))


def _batch_rows(metadata: Any) -> int:
    """Return the number of rows to read at once, so that rows of megabytes do not fill the memory."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, row_bytes)))


def _texts(metadata: Any) -> list[str]:
    """Return the paths of all columns of texts or bytes."""
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _parts(batch: Any) -> Iterator[tuple[Any, int]]:
    """Yield (rows, their bytes without a dictionary) of `batch`: one part if it is small, else halves of halves."""
    size = sum(map(_bytes_of, batch.columns))
    if size <= BATCH_BYTES or len(batch) <= 1:
        yield batch, size
        return
    rows, half = np.arange(len(batch)), len(batch) // 2
    # taken and not sliced: a cast of a slice writes out what lies around it too
    yield from _parts(batch.take(rows[:half]))
    yield from _parts(batch.take(rows[half:]))


def _bytes_of(column: Any) -> int:
    """Return the bytes of all values in `column`, written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        if not (pa.types.is_string(kind.value_type) or pa.types.is_binary(kind.value_type)):
            return int(column.nbytes)
        lengths = pc.binary_length(column.dictionary).cast(pa.int64())
        return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_bytes_of, column.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _bytes_of(column.flatten())
    return int(column.nbytes)


def _rows_of(part: Any, schema: Any) -> list[Mapping[str, Any]]:
    import pyarrow as pa

    try:
        written_out = pa.Table.from_batches([part]).cast(schema)
    except (pa.ArrowNotImplementedError, ValueError):  # a nesting that Arrow cannot cast is read as it is, slower
        written_out = part
    rows: list[Mapping[str, Any]] = written_out.to_pylist()
    return rows
