"""Rows of a dataset on the hub, through `datasets`; offline, one clear sentence."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from lorafit.data.raw_rows import RawRow
from lorafit.data.sources import DataFile
from lorafit.data.tables import without_nulls
from lorafit.errors import DataError

REACH_S = 3.0


@cache
def hub_dataset(hub_id: str) -> Any:
    """The `train` split of the dataset `hub_id`, memory-mapped by `datasets`. Raises DataError."""
    # imported here: they take seconds, and a local file never needs them
    import datasets
    from huggingface_hub import constants

    if not constants.is_offline_mode() and not _answers(constants.ENDPOINT):
        raise DataError(
            f"'{hub_id}' is no local file, and the hub cannot be reached",
            fix="check the path or the network; HF_HUB_OFFLINE=1 uses what was downloaded before",
        )
    try:
        return datasets.load_dataset(hub_id, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise DataError(
            f"'{hub_id}' is no local file, and no dataset with a train split either ({reason})",
            fix="check the name, or download it once and pass the files",
        ) from error


def _answers(endpoint: str) -> bool:
    """Whether the hub can be reached; asked first, because `datasets` would retry for half a minute."""
    # imported here, as `datasets` is: a local file never needs them
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    parts = urlsplit(endpoint)
    if getproxies():
        return True
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=REACH_S):
            return True
    except OSError:
        return False


def hub_rows(index: int, file: DataFile) -> Iterator[RawRow]:
    """The rows of the dataset; a row's place counts from 1."""
    for number, fields in enumerate(hub_dataset(file.hub_id), start=1):
        yield RawRow(index, number, b"", without_nulls(fields))


def hub_fingerprint(file: DataFile) -> str:
    """What changes when the dataset does."""
    return str(hub_dataset(file.hub_id)._fingerprint)
