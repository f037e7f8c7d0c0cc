"""Finding codes of data, and the count of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from lorafit.data.checks.rows import Observation, Tokenised, marker_styles
from lorafit.data.schema.records import Record
from lorafit.data.sources.raw_row import RawRow, Reject, rejected_line
from lorafit.findings import Finding, Severity


@dataclass(frozen=True, slots=True)
class Code:
    """One rule: its `title` (a noun phrase), `why` it matters and the `fix`.

    A row that breaks a `rejects` rule cannot be trained on as it is: it goes to rejected.jsonl, and the run
    stops unless `on_bad` is `drop`. A rule that `is_note` asks for nothing.
    """

    title: str
    why: str
    fix: str
    rejects: bool = False
    is_note: bool = False


def _bad(title: str, why: str, fix: str) -> Code:
    return Code(title, why, fix, rejects=True)


CODES: dict[str, Code] = {
    # the bytes and the JSON
    "D001": _bad("broken JSON", "the row cannot be read", "mend the line, or let lorafit check --fix set it aside"),
    "D002": _bad("no JSON object", "a row needs named fields", "write one {...} object per row"),
    "D003": _bad("a field named twice", "one of the two values would be lost", "keep one of the two"),
    "D004": _bad(
        "bytes that are not UTF-8",
        "lorafit would have to guess the letters",
        "name the encoding; files of Windows mostly need --set encoding=cp1252",
    ),
    "D005": _bad("raw control characters", "JSON forbids it unescaped", "lorafit check --fix removes it"),
    "D006": _bad("a line too long to be a row", "it is longer than 16 MiB", "check that the file has line ends"),
    "D007": _bad("too deep nesting", "no training row nests deeper than 64 levels", "flatten the row"),
    "D008": _bad(
        "cells that do not fit the header", "its cells cannot be named", "quote cells that hold the separator"
    ),
    "D053": _bad(
        "broken CSV", "its cells cannot be told apart", 'close each quote, and write a quote inside a cell as ""'
    ),
    "D009": Code(
        "unusual bytes", "nothing is lost, but other tools may stumble", "lorafit check --fix writes it clean"
    ),
    # the fields
    "D010": _bad("a missing field", "there is nothing to train on", "fill it in, or name it with --map"),
    "D011": _bad("a null field", "a null would be trained as an empty text", "fill it in, or drop the row"),
    "D012": _bad(
        "a field of the wrong kind", "only text is trained on", "write it as text; a role is one of those named"
    ),
    "D013": _bad("an empty response", "the model would learn to say nothing", "fill it in, or drop the row"),
    "D014": Code("an empty prompt", "the model would learn to answer nothing in particular", "fill the prompt in"),
    "D015": Code("a response equal to its prompt", "the model would learn to echo", "check how the rows were made"),
    "D016": _bad("no assistant turn", "nothing in it is supervised", "add the answer, or drop the row"),
    "D017": Code("roles out of order", "the template may join or reject such turns", "alternate user and assistant"),
    "D018": Code(
        "an assistant turn first",
        "it answers no question; it is learnt after a system text, and is context without one",
        "start with the user",
    ),
    "D019": Code(
        "turns after the last answer", "what follows the last answer is not trained on", "end with the assistant"
    ),
    "D037": Code(
        "columns that are not used", "nothing in them is learnt", "a column to learn gets a place with --map input=NAME"
    ),
    "D038": _bad(
        "a field that would be lost",
        "its meaning is known, and this shape of row has no place for it",
        "give it a place (--map input=NAME, --map reasoning=NAME), choose the answer (--map response=NAME), "
        "or --ignore D038",
    ),
    "D051": Code(
        "a loss flag on a turn that is no answer",
        "only the assistant's words are learnt",
        "take the flag out, or set it to 0",
    ),
    "D052": Code(
        "files left out by their names",
        "what tests the result must not be trained on",
        "name a file itself to train on it",
    ),
    # the tokens
    "D020": _bad(
        "longer than max_length",
        "lorafit never cuts a row in silence",
        "--set max_length=N, or --on-long drop or split-turns",
    ),
    "D021": _bad(
        "no supervised token",
        "it would cost time and teach nothing",
        "flag one of its answers as learnt, or drop the row",
    ),
    "D022": _bad(
        "stop token missing or masked",
        "the model would not learn to stop",
        "name a template that ends answers with a special token (--set template=FILE)",
    ),
    "D023": _bad("BOS doubled", "serving sends it once: the prompts would differ", "take BOS out of the text"),
    "D024": _bad(
        "refused by the chat template",
        "it cannot be rendered",
        "mend the row as the template says, or name another template (--set template=FILE)",
    ),
    "D025": Code(
        "earlier answers not supervised",
        "the template rewrites them later on",
        "--set split_answers=true makes each answer its own example",
    ),
    "D026": _bad(
        "a prompt that serving would not send",
        "the model would be asked otherwise than it was taught",
        "name the template that serving will use (--set template=FILE), or --ignore D026 if this is it",
    ),
    "D027": Code(
        "an answer that the template changed",
        "it is not learnt as you wrote it",
        "see check --show, and name a template that shows all of it (--set template=FILE)",
    ),
    "D028": Code(
        "a token across an answer's edge",
        "it is not supervised",
        "name a template whose prompt ends with a line end or a special token (--set template=FILE)",
    ),
    "D029": Code(
        "tools that the template does not show",
        "the model never sees them",
        "name a template that shows tools (--set template=FILE)",
    ),
    "D054": Code(
        "variables that the template does not read",
        "they change nothing",
        "take them out of chat_template_kwargs, or name a template that reads them (--set template=FILE)",
    ),
    "D055": Code(
        "turns written as the template takes them",
        "nothing is lost, but the ids are not those of your text",
        "see check --show",
        is_note=True,
    ),
    "D056": Code(
        "tags that the base does not write around its reasoning",
        "the model would learn them as text of its answer",
        "put one block of reasoning before the answer, or move it to the field reasoning_content",
    ),
    "D039": _bad(
        "text that the template leaves out",
        "the model would never see it",
        "name a template that shows it (--set template=FILE), take it out of the rows, or --ignore D039",
    ),
    # the set as a whole
    "D030": Code("exact copies", "copies are learnt by heart", "lorafit check --fix drops them"),
    "D031": Code("near copies", "near copies count double", "keep one of each, or accept them with --ignore D031"),
    "D032": Code("near copies on both sides of the split", "held-out results would flatter", "take it out of one side"),
    "D033": Code("conflicting answers to one prompt", "the model is pulled both ways", "keep one answer"),
    "D034": Code("one response over and over", "the model may always answer that", "drop some of those rows"),
    "D035": Code(
        "no row left to train on", "there is nothing to learn", "bring rows, or mend those that were rejected"
    ),
    "D036": Code("no row held out", "nothing will measure the result", "add rows, or name a file with --holdout FILE"),
    # the text
    "D040": Code(
        "chat template markers in the text", "the template adds its own: they would nest", "store the plain text"
    ),
    "D041": Code("control characters", "they are seldom meant", "lorafit check --fix removes them"),
    "D042": Code(
        "wrongly decoded text (mojibake)", "the model would learn broken letters", "decode the source as UTF-8"
    ),
    "D043": _bad("half a surrogate pair", "it is no character and cannot be tokenised", "mend the escape \\uD8xx"),
    "D044": Code(
        "what looks like a secret", "models repeat what they are trained on", "take the secret out, revoke it"
    ),
    "D045": _bad(
        "a special token of the base in the text",
        "it would be read as the token, not as text: an end-of-turn there teaches the model to stop",
        "take it out of the text; if the rows are already templated, store the plain turns",
    ),
    "D046": Code(
        "placeholders instead of answers", "the model would learn to say them", "write the answers, or drop the rows"
    ),
    "D047": Code("HTML left in the text", "the model would learn to write it", "convert it to plain text or Markdown"),
    "D049": Code(
        "one system text in all rows",
        "the model is only taught to answer after it",
        "serve with the same system text: lorafit chat RUN --system TEXT",
    ),
    # the base
    "D048": Code(
        "tokens without a row in the base's embedding table",
        "the first step would end in an index error",
        "take the added token out of the tokenizer, or use a base whose embeddings were resized for it",
    ),
    "D050": Code(
        "special tokens that the base never learnt",
        "LoRA leaves the embeddings alone by default: the model reads these tokens as noise",
        "set trainable_tokens to them, train the instruct version, "
        "or take its chat template out so that the fallback template is used",
    ),
    "D057": Code(
        "the initial adapter was trained on other prompts",
        "it has learnt to answer those, and this run teaches it others",
        "set template to the first run's chat template, or train without init_adapter",
    ),
    "P5": Code(
        "mixed instruction templates",
        "the model learns several formats at once, and serving uses one",
        "strip the markers and store plain instruction and response",
    ),
}
"""Every code this room reports, with its text."""


EXAMPLES = 5


@dataclass
class Seen:
    """The count of one code, its first places, and the details of the first, or of all if `is_total`."""

    count: int = 0
    places: list[str] = field(default_factory=list)
    detail: str = ""
    fix: str = ""
    is_total: bool = False


@dataclass
class FindingCounts:
    """Counts by code."""

    seen: dict[str, Seen] = field(default_factory=dict)

    def add(self, code: str, place: str, detail: str = "", fix: str = "") -> None:
        """Count one sighting. `fix` replaces the code's own fix."""
        self.add_all(code, 1, [(place, detail)])
        entry = self.seen[code]
        entry.fix = entry.fix or fix

    def add_all(self, code: str, count: int, first: Sequence[tuple[str, str]]) -> None:
        """Count `count` sightings. `first` holds the first few places and their details."""
        if not count:
            return
        entry = self.seen.setdefault(code, Seen(detail=first[0][1]))
        entry.count += count
        entry.places += [place for place, _ in first[: EXAMPLES - len(entry.places)]]

    def finding(self, code: str, severity: Severity, unit: str = "row") -> Finding:
        """Return the finding for `code`, which has been counted."""
        entry, rule = self.seen[code], CODES[code]
        plural = "" if entry.count == 1 else "s"
        message = f"{rule.title} in {entry.count:,} {unit}{plural}"
        if entry.detail:
            of_first = entry.count > 1 and not entry.is_total
            message += f"; the first: {entry.detail}" if of_first else f": {entry.detail}"
        fix = entry.fix or rule.fix
        return Finding(code, severity, message, entry.places[0], rule.why, fix, entry.count, tuple(entry.places))

    def findings(self, strict: Iterable[str]) -> list[Finding]:
        """Return one finding for each counted code. Codes in `strict` are errors, the others warnings or notes."""
        errors = set(strict)
        milder = {code: Severity.INFO if CODES[code].is_note else Severity.WARNING for code in self.seen}
        return [self.finding(code, Severity.ERROR if code in errors else milder[code]) for code in sorted(self.seen)]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping; `from_dict` is its inverse."""
        return {code: [entry.count, entry.places, entry.detail, entry.fix] for code, entry in self.seen.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> FindingCounts:
        """Return the counts that `to_dict` wrote."""
        return cls({code: Seen(*entry) for code, entry in fields.items()})


STYLES_APART = " and "


@dataclass
class Counts:
    """Rows by outcome: `read = kept + rejected + dropped`. Of the kept ones `split` were cut at turns."""

    read: int = 0
    kept: int = 0
    rejected: int = 0
    dropped: int = 0
    split: int = 0


@dataclass
class RowOutcomes:
    """Counts and tallies of rows. Rejected and dropped rows are written to `rejected`; `names` are the file names.

    `markers` holds, for each set of template styles that share a row, how many rows do and where the first stands.
    """

    names: Sequence[str]
    rejected: IO[bytes]
    counts: Counts = field(default_factory=Counts)
    finding_counts: FindingCounts = field(default_factory=FindingCounts)
    markers: dict[str, list[Any]] = field(default_factory=dict)
    fields_seen: set[str] = field(default_factory=set)
    turn_fields_seen: set[str] = field(default_factory=set)
    system: str | None = None
    rows_noted: int = 0
    lost_answers: int = 0
    lost_tokens: int = 0

    def reject(self, row: RawRow, reject: Reject, *, dropped: bool = False) -> None:
        """Count a row that will not be trained on, and write it to `rejected` with the reason."""
        if dropped:
            self.counts.dropped += 1
        else:
            self.counts.rejected += 1
        place = reject.place(self.names[row.file], row.line)
        near = f" near “{reject.excerpt}”" if reject.excerpt else ""
        self.finding_counts.add(reject.code, place, reject.reason + near, reject.fix)
        raw = row.raw or json.dumps(row.fields, default=str).encode()
        self.rejected.write(rejected_line(place, reject, raw))

    def note(self, record: Record, observations: Sequence[Observation]) -> None:
        """Count the observations on a kept row."""
        for code, seen in observations:
            self.finding_counts.add(code, record.source, seen)
            if code == "D040" and (styles := marker_styles(record)):
                entry = self.markers.setdefault(STYLES_APART.join(styles), [0, record.source])
                entry[0] += 1

    def note_tokens(self, one: Tokenised) -> None:
        """Count the tokens that the template takes from the loss of a kept row."""
        self.lost_answers += one.lost_answers
        self.lost_tokens += one.lost_tokens

    def note_fields(self, row: RawRow, record: Record) -> None:
        """Note the names of a row's fields, of its turns' further fields, and its system text."""
        self.fields_seen.update(row.fields or ())
        self.turn_fields_seen.update(record.unread)
        for turn in record.turns:
            if turn.extra:
                # a tool's name is known by the call that it answers
                self.turn_fields_seen.update(name for name in turn.extra if name != "name" or turn.role != "tool")
        system = record.system and record.system.replace("\r\n", "\n").rstrip()
        if not self.rows_noted:
            self.system = system
        elif system != self.system:
            self.system = None
        self.rows_noted += 1

    def facts(self) -> dict[str, Any]:
        """Return everything but the rejected rows, JSON-ready."""
        return {
            "counts": asdict(self.counts),
            "finding_counts": self.finding_counts.to_dict(),
            "markers": self.markers,
            "turn_fields": sorted(self.turn_fields_seen),
            "system": self.system if self.rows_noted > 1 else None,
            "lost": [self.lost_answers, self.lost_tokens],
        }
