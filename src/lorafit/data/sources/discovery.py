"""Discovery: the files behind paths, patterns, folders and dataset names of the hub."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from lorafit.data.sources.files import DataFile, reading
from lorafit.data.sources.kinds import HEAD_BYTES, binary_kind, text_format, text_kind
from lorafit.data.sources.raw_row import excerpt
from lorafit.errors import DataError

FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
OTHER_KINDS = {
    ".xlsx": ("is an Excel workbook", "save the sheet as 'CSV UTF-8' in Excel, and name that file"),
    ".xls": ("is an Excel workbook", "save the sheet as 'CSV UTF-8' in Excel, and name that file"),
    ".ods": ("is a LibreOffice sheet", "save it as CSV, and name that file"),
    ".zip": ("is a ZIP archive", "unpack it (python -m zipfile -e FILE .), and name the file that was in it"),
    ".tar": ("is a tar archive", "unpack it (python -m tarfile -e FILE .), and name the file that was in it"),
    ".tgz": ("is a tar archive", "unpack it (python -m tarfile -e FILE .), and name the file that was in it"),
    ".bz2": ("is packed with bzip2", "unpack it (bunzip2 FILE), and name the file that was in it"),
    ".xz": ("is packed with xz", "unpack it (unxz FILE), and name the file that was in it"),
    ".7z": ("is a 7-Zip archive", "unpack it, and name the file that was in it"),
    ".txt": (
        "is a text file",
        "name it .csv or .tsv if it is a table; else write one JSON object per line to a .jsonl",
    ),
    ".yaml": ("is YAML", "name a recipe alone, or write the rows as .jsonl"),
}
SPLITS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("valset", "devset", "evalset", "holdout", "heldout"), "validation"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
}
"""Words in the names of files and folders that say which split they are."""
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
"""A word of a name, as in train_data, trainData, TRAIN1 and TrainData."""
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
KNOWN = "lorafit reads .jsonl, .json, .csv, .tsv, .parquet and .arrow, each also as .gz or .zst"
UNREAD = "other"
"""The split of a folder's sheets and archives: they hold rows perhaps, and are named as left out."""
SHEETS_AND_ARCHIVES = frozenset(OTHER_KINDS) - {".txt", ".yaml"}


def find_files(named: Sequence[str], *, held_out: bool = False, encoding: str | None = None) -> list[DataFile]:
    """Return the files of the paths, globs and folders in `named`, in that order; folders and globs are sorted.

    Raises DataError when something named does not exist, cannot be read, or is of no known format.
    """
    if not named:
        raise DataError("no data was named", fix="pass a file, a folder, a glob or a hub dataset id")
    files: list[DataFile] = []
    for entry in named:
        files += [replace(file, encoding=encoding or "") for file in _files_of(entry, held_out)]
    seen: dict[str, DataFile] = {}
    for file in files:
        seen.setdefault(file.hub_id or str(file.path.resolve()), file)
    return list(seen.values())


def _files_of(entry: str, held_out: bool) -> list[DataFile]:
    try:
        path = Path(entry or "\0").expanduser()  # an empty name is no file, and not the folder we are in
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:
        return _not_a_path(entry, error, held_out)
    if stat.S_ISDIR(mode):
        return _folder(path, held_out)
    if not stat.S_ISREG(mode):
        raise DataError("is not a regular file", where=entry, fix="write the rows to a file first")
    return [_data_file(path, held_out)]


def _not_a_path(entry: str, error: Exception, held_out: bool) -> list[DataFile]:
    if glob.has_magic(entry):
        matches = glob.glob(str(Path(entry).expanduser()), recursive=True)  # noqa: PTH207
        found = sorted(path for path in matches if os.path.isfile(path))  # noqa: PTH113 - unreadable ones raise nothing
        if not found:
            raise DataError("no file matches the pattern", where=entry, fix="check the pattern")
        root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(entry).expanduser().parts))
        return [_in_folder(root, Path(path), held_out) for path in found]
    if isinstance(error, PermissionError):
        raise DataError("cannot be read (permission denied)", where=entry, fix="check its rights") from error
    if HUB_ID.fullmatch(entry) and not _suffixes(entry)[0] and not Path(entry).parent.is_dir():
        return [DataFile(Path(entry), entry, "hub", hub_id=entry, held_out=held_out)]
    raise DataError("no such file", where=entry or "''", fix="check the path") from error


def _folder(path: Path, held_out: bool) -> list[DataFile]:
    found = sorted(
        Path(root) / name
        for root, _, names in os.walk(path)
        for name in names
        if not name.startswith((".", "~$")) and "/." not in root.removeprefix(str(path))
    )
    others = [file for file in found if not _suffixes(file.name)[0] and file.suffix.lower() in SHEETS_AND_ARCHIVES]
    found = [file for file in found if _suffixes(file.name)[0] and _is_no_companion(file)]
    if not found:
        raise DataError("the folder holds no data file", where=str(path), fix=KNOWN)
    unread = [DataFile(file, excerpt(str(file), 4096), "", held_out=held_out, split=UNREAD) for file in others]
    return [_in_folder(path, file, held_out) for file in found] + unread


def _in_folder(root: Path, file: Path, held_out: bool) -> DataFile:
    splits = [split for part in file.relative_to(root).parts if (split := _split_of(part))]
    return replace(_data_file(file, held_out), split=splits[0] if splits else "")


def _split_of(name: str) -> str:
    """Return the split in the name of a file or folder; empty without one."""
    words = [word.lower() for word in WORD.findall(name.replace("held_out", "heldout").replace("held-out", "heldout"))]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def _is_no_companion(file: Path) -> bool:
    """Return True if a file holds rows. `datasets.save_to_disk` writes notes and caches beside them."""
    if file.name in ("dataset_dict.json", "dataset_info.json", "state.json"):
        beside = (file.parent / "dataset_dict.json", file.parent / "state.json")
        return not any(note.is_file() for note in beside)
    if file.suffix != ".arrow" or not (file.parent / "state.json").is_file():
        return True
    return not file.name.startswith("cache-")


def _suffixes(name: str) -> tuple[str, str]:
    """Return (format, compression) by the name's endings. An unknown format is empty."""
    parts = [part.lower() for part in Path(name).suffixes]
    compression = COMPRESSIONS.get(parts[-1], "") if parts else ""
    if compression:
        parts.pop()
    return (FORMATS.get(parts[-1], "") if parts else ""), compression


def _data_file(path: Path, held_out: bool) -> DataFile:
    form, compression = _suffixes(path.name)
    tar = not form and path.name.lower().endswith(".tar.gz")
    if not form and (kind := OTHER_KINDS.get(".tgz" if tar else path.suffix.lower())):
        raise DataError(kind[0], where=str(path), fix=kind[1].replace("FILE", f"'{path}'"))
    if not form:
        raise DataError("is not a data file by its name", where=str(path), fix=KNOWN)
    file = DataFile(path, excerpt(str(path), 4096), form, compression, held_out=held_out)
    with reading(file):
        if path.stat().st_size == 0:
            raise DataError("the file is empty", where=str(path), fix="write one row per line into it")
        _check_kind(file)
    return file


def _check_kind(file: DataFile) -> None:
    """Raise DataError if the first bytes show another kind of file than the name."""
    with file.path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    kind, suffix = binary_kind(head)
    if kind and (not suffix or suffix not in ("." + file.format, "." + file.compression)):
        raise DataError(
            f"is {kind} by its first bytes, whatever its name says", where=file.name, fix=_fix_of(file, suffix)
        )
    text = head.decode("utf-8", "replace")
    if not kind and (found := text_kind(text)):
        raise DataError(found[0], where=file.name, fix=found[1])
    is_binary = file.compression or file.format in ("parquet", "arrow")
    if not kind and is_binary and (form := text_format(text)):
        stem = file.path.with_suffix("") if file.compression else file.path
        name = stem if FORMATS.get(stem.suffix) in ("jsonl", "csv") else stem.with_suffix(f".{form}")
        what = f"is {form.upper()} by its first bytes, whatever its name says"
        raise DataError(what, where=file.name, fix=f"mv '{file.name}' '{name}', and name that")


def _fix_of(file: DataFile, suffix: str) -> str:
    """Return the way from a file of another kind to one that is read."""
    path = file.path
    if suffix == ".zip":
        unpack = OTHER_KINDS[".zip"][1].replace("FILE", f"'{path}'")
        return f"save an Excel workbook's sheet as 'CSV UTF-8'; of an archive, {unpack}"
    if suffix in (".gz", ".zst", ".parquet", ".arrow"):
        name = f"{path.name}{suffix}" if suffix in (".gz", ".zst") else f"{path.stem}{suffix}"
        return f"mv '{file.name}' '{path.with_name(name)}', and name that"
    if suffix in (".bz2", ".xz"):
        named = f"{path}{suffix}"
        return f"mv '{file.name}' '{named}', then {OTHER_KINDS[suffix][1].replace('FILE', repr(named))}"
    if suffix:
        return OTHER_KINDS[suffix][1].replace("FILE", f"'{path}'")
    return f"write its rows as .jsonl, one object a line; {KNOWN}"
