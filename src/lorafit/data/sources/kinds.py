"""Kinds: what a file is by its first bytes, where its name says something else."""

from __future__ import annotations

import json
import re
import shlex

from lorafit.config import one_line

HEAD_BYTES = 512
MAGIC = (
    (b"\x1f\x8b\x08", "a gzip file", ".gz"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", ".zst"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"ARROW1", "an Arrow file", ".arrow"),
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook", ".zip"),
    (b"PK\x05\x06", "an empty ZIP archive", ""),
    (b"BZh", "packed with bzip2", ".bz2"),
    (b"\xfd7zXZ\x00", "packed with xz", ".xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", ".7z"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook or another Office file", ".xls"),
    (b"%PDF-", "a PDF", ""),
    (b"\x89PNG\r\n\x1a\n", "an image", ""),
    (b"\xff\xd8\xff", "an image", ""),
    (b"SQLite format 3\x00", "an SQLite database", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
    (b"{\\rtf", "a document of a word processor", ""),
    (b"\x80\x04\x95", "a Python pickle", ""),
    (b"\x80\x05\x95", "a Python pickle", ""),
)
"""How files of other kinds begin, and the ending that would be right; empty where none is read."""
TAR = (257, b"ustar")
POINTER = "version https://git-lfs.github.com/"
XET_POINTER = "# xet version"
DOWNLOAD = "download the file again, and open it first"
PAGE = re.compile(r"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
MESSAGE = re.compile(
    r"(?:(?:error:? ?)?\d{3}:? )?(?:entry |repository |file |page )?(?:not found|forbidden|access denied|unauthorized|"
    r"bad gateway|bad request|too many requests|internal server error|service unavailable|gone|"
    r"invalid username or password|access to \S+ .* is restricted)\b.{0,200}",
    re.IGNORECASE,
)
"""A server's words that were saved in place of a file."""
NAME = re.compile(r"\"?[A-Za-z_][\w .-]{0,40}\"?")


def binary_kind(head: bytes) -> tuple[str, str]:
    """Return (kind, ending) of a file of another kind by its first bytes; empty texts for text and anything unknown."""
    if head[TAR[0] : TAR[0] + 5] == TAR[1]:
        return "a tar archive", ".tar"
    return next(((kind, suffix) for mark, kind, suffix in MAGIC if head.startswith(mark)), ("", ""))


def text_kind(head: str) -> tuple[str, str] | None:
    """Return (what a text is, the fix) if it stands in place of a file of rows: a pointer, a page or a message."""
    start = head.lstrip()
    if start.startswith(POINTER):
        return "is a pointer of git-LFS, not the file itself", "run `git lfs pull` where it was cloned"
    if start.startswith(XET_POINTER):
        return (
            "is a pointer of git-xet, not the file itself",
            "run `git lfs pull` where it was cloned, with git-xet installed",
        )
    if PAGE.match(start) or (start.startswith("<?xml") and PAGE.search(start)):
        return "is a web page, not data; an error or a login was saved in its place", DOWNLOAD
    if start.startswith("<?xml"):
        return "is XML, not data; an error of a server was saved in its place, or rows of another tool", DOWNLOAD
    if len(start) < HEAD_BYTES // 2 and MESSAGE.fullmatch(start.strip()):
        return f"holds a server's message ('{one_line(start.strip())[:60]}') in place of rows", DOWNLOAD
    return None


def text_format(head: str) -> str:
    """Return json for lines or a list of objects, csv for a line of names above another; empty where unclear."""
    start = head.lstrip("\ufeff \t\r\n")
    if start[:1] in ("{", "["):
        first, newline, _ = start.partition("\n")
        named = re.match(r'[\[{]\s*(?:[\[{]\s*)?"(?:[^"\\]|\\.)*"\s*:', first)
        return "json" if named or (newline and first.strip() in ("{", "[", "[{")) else ""
    first, _, rest = start.partition("\n")
    for separator in (",", ";", "\t"):
        names = first.strip().split(separator)
        if len(names) > 1 and all(NAME.fullmatch(name.strip()) for name in names) and rest.lstrip()[:1] not in "{[":
            return "csv"
    return ""


def objects_one_below_another(text: str) -> bool:
    """Return True if a text begins with an object over several lines, as pretty-printing writes each row."""
    first, newline, _ = text.lstrip().partition("\n")
    if not newline or first.strip() != "{":
        return False
    try:
        return isinstance(json.JSONDecoder().raw_decode(text.lstrip())[0], dict)
    except ValueError:
        return False


def on_one_line_each(path: str) -> str:
    """Return the command that writes objects over several lines as one row a line."""
    parts = "json.loads('[' + re.sub(r'}\\s*\\n\\s*{', '},{', t) + ']')"
    read = f"t = open({path!r}, encoding='utf-8-sig').read()"
    return f'python -c "import json, re; {read}; [print(json.dumps(r)) for r in {parts}]" > rows.jsonl'


PYTHONS = re.compile(r"\s*(?:\[\s*)?\{\s*'[^'\n]*'\s*:")
YAMLS = re.compile(
    r"\A\s*(?:#.*\n\s*)*(?:---[ \t]*\n\s*)?- [\w-]+:(?: |[ \t]*$)|\A\s*---[ \t]*\n\s*[\w-]+:(?: |$)", re.MULTILINE
)
DRAWN = re.compile(r"^[ \t]*\|.*\|[ \t]*\n[ \t]*\|[-:| \t]+\|[ \t]*$", re.MULTILINE)
"""The names of a table in Markdown, above the line that it draws below them."""


def written_otherwise(text: str, path: str, *, is_csv: bool) -> tuple[str, str] | None:
    """Return (what a text is, the command that rewrites it) of rows in Python's or YAML's words, or drawn."""
    drawn = DRAWN.search(text)
    if drawn and (not is_csv or text[: drawn.start()].strip()):
        what = "holds a table in Markdown" + (" below other text" if text[: drawn.start()].strip() else "")
        return what, f"write the table alone: grep '^ *|' {shlex.quote(path)} > rows.csv"
    if is_csv:
        return None
    opened = f"open({path!r}, encoding='utf-8-sig')"
    whole = [line for line in text.lstrip("\ufeff").split("\n")[:-1] if line.strip()] or [text]
    if all(PYTHONS.match(line) for line in (whole[:1] if text.lstrip()[:1] == "[" else whole)):
        each = "(ast.literal_eval(t) if t[0] == '[' else [ast.literal_eval(l) for l in t.split('\\n') if l.strip()])"
        code = f"import ast, json; t = {opened}.read().strip(); [print(json.dumps(r)) for r in {each}]"
        return "holds Python's objects ('single quotes'), not JSON", f'python -c "{code}" > rows.jsonl'
    if YAMLS.match(text):
        each = "for d in yaml.safe_load_all(t) if d for r in (d if isinstance(d, list) else [d])"
        code = f"import json, yaml; t = {opened}; [print(json.dumps(r, default=str)) {each}]"
        return "is YAML, not JSON", f'python -c "{code}" > rows.jsonl'
    return None
