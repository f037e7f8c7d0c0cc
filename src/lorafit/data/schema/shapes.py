"""Shape: the way from a dataset's fields to records. One shape per dataset (detection.py finds it)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lorafit.data.schema.exports import answers_as_values, pythons_own
from lorafit.data.schema.fields import (
    KWARGS,
    Fields,
    from_json,
    is_empty,
    kind_of,
    optional_fault,
    read_calls,
    read_kwargs,
    read_tools,
    text_fault,
)
from lorafit.data.schema.names import respelled, spelling
from lorafit.data.schema.parts import system_text
from lorafit.data.schema.preferences import CHOSEN, judged_bad, keeps_the_good
from lorafit.data.schema.records import CALLS, DOCUMENT, REASONING, Record, Turn
from lorafit.data.schema.side_columns import (
    FLAG_LISTS,
    LAST_ONLY,
    ROW_FLAG,
    UNCLEAR_LISTS,
    is_said,
    is_switch,
    last_only,
    row_flag_fault,
    seeming_fault,
    suggested_places,
    with_flags,
    with_reasoning,
)
from lorafit.data.schema.turn_forms import turns_of
from lorafit.data.schema.turns import (
    MEDIA,
    REASONING_NAMES,
    TURNS_AS_TEXT,
    as_turns,
    exchange_in,
    read_message,
    read_turns,
    speakers_in,
)
from lorafit.data.sources.raw_row import Reject

ANSWERS = ("response", "output", "completion", "answer")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction")
INPUTS = ("input", "context")
TOOLS = ("tools", "functions", "available_tools", "toolConfig")
LISTS = ("messages", "conversations", "contents", "conversation")
MEANT = frozenset(
    (
        *SYSTEMS, *INPUTS, *TOOLS, *ANSWERS, *LISTS, *REASONING_NAMES, "instruction", "prompt", "question", "query",
        "history", KWARGS, "documents", "contexts", "passage", "passages", "choices", "options", "thought", "thoughts",
        "cot", "chain_of_thought", "rationale", *MEDIA, *CHOSEN,
    )
)  # fmt: skip
"""Fields whose meaning is known: a row never loses what stands in one of them."""
SAYS_WHETHER = frozenset((*FLAG_LISTS, *UNCLEAR_LISTS, "label"))
"""Fields of a row by which it, or some of its turns, are kept from the loss; `label` is that of KTO's data."""
EXCHANGE = frozenset((*SYSTEMS, *INPUTS, *TOOLS, *REASONING_NAMES, "history", KWARGS, LAST_ONLY))
ROW_NAMES = MEANT | SAYS_WHETHER | {"answers", LAST_ONLY}
"""Every name of a column that means something; spelled otherwise (`System`, `toolConfig`) it means the same."""


@dataclass(frozen=True)
class Shape:
    """The field layout of one dataset.

    Attributes:
        kind: instruction, prompt, messages, conversations, calls (a query, and calls as its answers) or text.
        answer: the field of the answer, where the kind has one.
        mapped: the user's own names, as {ours: theirs}.
        labels_judge: whether a `label` of 0 means a bad answer, as in KTO's data, and no class.
    """

    kind: str
    answer: str = ""
    mapped: Mapping[str, str] = field(default_factory=dict)
    labels_judge: bool = False

    @property
    def title(self) -> str:
        """The usual name of the shape."""
        names = {
            "instruction": f"instruction/input/{self.answer}",
            "prompt": f"prompt/{self.answer}",
            "messages": "messages (OpenAI)",
            "conversations": "conversations (ShareGPT)",
            "contents": "contents (Gemini)",
            "conversation": "conversation (a list of turns)",
            "calls": "query/answers/tools (xLAM)",
            "text": "text (documents)",
        }
        return names[self.kind]

    @cached_property
    def used(self) -> frozenset[str]:
        """The fields that this shape reads."""
        by_kind = {
            "instruction": ("instruction", self.answer, *EXCHANGE),
            "prompt": ("prompt", self.answer, *EXCHANGE),
            **{name: (name, *SYSTEMS, *TOOLS, KWARGS, LAST_ONLY) for name in LISTS},
            "calls": ("query", "answers", *SYSTEMS, *TOOLS, KWARGS),
            "text": ("text",),
        }
        return frozenset(by_kind[self.kind])

    @cached_property
    def _known(self) -> frozenset[str]:
        return ROW_NAMES.union(self.mapped)

    @cached_property
    def _unused(self) -> frozenset[str]:
        chosen = ANSWERS if self.answer in self.mapped else ()
        return (MEANT | SAYS_WHETHER) - self.used - set(chosen)

    def record(self, fields: Fields, source: str) -> Record | Reject:
        """Return the record of `fields`, or a Reject that names the faulty field."""
        row = renamed(fields, self.mapped)
        read: Callable[[Fields, str], Record | Reject] = {
            "instruction": self._instruction,
            "prompt": self._prompt,
            **dict.fromkeys(LISTS, self._list),
            "calls": self._called,
            "text": self._document,
        }[self.kind]
        return read(row, source)

    def lost(self, fields: Fields, record: Record) -> str:
        """Return the content of a known field that the record lacks, as a sentence; empty if nothing is lost."""
        row = renamed(fields, self.mapped)
        for name in sorted(row.keys() & self._unused):
            value = row[name]
            if name in SAYS_WHETHER:
                if fault := row_flag_fault(name, value, of_turns=self.kind in LISTS, labels_judge=self.labels_judge):
                    return fault
            elif name in CHOSEN:
                if isinstance(value, str | list | dict) and not is_empty(value) and not is_said(value, record):
                    return f"the better answer in '{self.mapped.get(name, name)}' ({kind_of(value)}) is not used"
            elif not is_empty(value) and not is_said(value, record):
                return f"the field '{self.mapped.get(name, name)}' is not used in rows of {self.title}"
        for name in REASONING_NAMES:
            if name in row and is_switch(row[name]):
                return f"the field '{self.mapped.get(name, name)}' holds '{row[name]}', a switch and not a text"
        answer = self.answer or self.kind
        return judged_bad(fields, self.mapped.get(answer, answer)) or seeming_fault(row, self._known)

    def fix_of_lost(self, lost: str) -> str:
        """Return the fix for what `lost` says; empty if the shape has places that the general one names."""
        if lost.startswith(ROW_FLAG):
            return "leave such rows out with --on-bad drop, or take the flag out of them"
        if better := re.match(r"the better answer in '(.*)' \((.*)\)", lost):
            if self.answer:
                return f"train on it: --map {self.answer}={better[1]}"
            return f"train on it: --map messages={better[1]}" if better[2] == "a list" else IN_LAST_TURN
        if self.kind in ("instruction", "prompt"):
            return ""
        if self.kind in LISTS and lost.startswith("the field 'context'"):  # Vertex' chats
            return "--map system=context if it is what the model is told first, or --ignore D038"
        return "write it into the turn that it belongs to, or go on without it: --ignore D038"

    def unused(self, names: set[str]) -> list[str]:
        """Return the field names of the rows that this shape does not read, sorted."""
        respelling = spelling(tuple(sorted(names - set(self.mapped.values()))), ROW_NAMES)
        taken = set(self.mapped.values())
        displaced = {ours for ours, theirs in self.mapped.items() if ours != theirs}
        # a text that several turns could mean, and flags that leave a turn out, are errors if they are not read
        read = self.used | set((*REASONING_NAMES, *FLAG_LISTS) if self.kind in LISTS else ())
        unread = {name for name in names if respelling.get(name, name) not in read}
        return sorted(name for name in names if name not in taken and (name in displaced or name in unread))

    def fix_of_unused(self, names: set[str], where: str) -> str:
        """Return the way to use unused columns, with `--map` where their names say what they hold.

        Empty where the general one holds.
        """
        has_places = self.kind in ("instruction", "prompt", *LISTS)
        if flags := suggested_places(self.unused(names), names, self.mapped) if has_places else []:
            return f"a column to learn gets a place: {' '.join(flags)}"
        if judged := keeps_the_good(self.unused(names), where):
            return judged
        return "" if self.kind in ("instruction", "prompt") else "a column to learn is written into a turn or a text"

    def _instruction(self, row: Fields, source: str) -> Record | Reject:
        asked = row.get("instruction")
        if speakers_in(asked) if isinstance(asked, list) else isinstance(asked, str) and TURNS_AS_TEXT.match(asked):
            return self._prompt({**row, "prompt": asked}, source)
        return text_fault(row, "instruction") or _exchange(row, "instruction", self.answer, source)

    def _prompt(self, row: Fields, source: str) -> Record | Reject:
        asked = as_turns(row.get("prompt"), False)
        answered = as_turns(row.get(self.answer), isinstance(asked, list))
        if isinstance(asked, list) or isinstance(answered, list):
            return _asked_in_turns({**row, "prompt": asked, self.answer: answered}, self.answer, source)
        return text_fault(row, "prompt") or _exchange(row, "prompt", self.answer, source)

    def _list(self, row: Fields, source: str) -> Record | Reject:
        return _conversation(row, self.kind, source)

    def _called(self, row: Fields, source: str) -> Record | Reject:
        if fault := text_fault(row, "query"):
            return fault
        calls = read_calls(row.get("answers"), "answers")
        if isinstance(calls, Reject):
            return calls
        return _assembled(row, [Turn("user", row["query"]), Turn("assistant", "", {CALLS: calls})], source)

    def _document(self, row: Fields, source: str) -> Record | Reject:
        fault = text_fault(row, "text")
        if fault is None and not row["text"].strip():
            fault = Reject("D013", "the text is empty")
        return fault or Record((Turn(DOCUMENT, row["text"]),), source)


IN_LAST_TURN = "write it into the last turn, or go on with the answer that stands there: --ignore D038"


def renamed(fields: Fields, mapped: Mapping[str, str]) -> Fields:
    """Return the row with each mapped field under lorafit's name in place of its own."""
    if not mapped:
        return respelled(fields, ROW_NAMES)
    taken = set(mapped.values())
    kept = {name: value for name, value in fields.items() if name not in taken}
    ours = {ours: fields[theirs] for ours, theirs in mapped.items() if theirs in fields}
    return {**{name: value for name, value in respelled(kept, ROW_NAMES).items() if name not in ours}, **ours}


def _exchange(row: Fields, asks: str, answers: str, source: str) -> Record | Reject:
    """Return the record of a question with its input, its history, and the answer."""
    if EXCHANGE.isdisjoint(row) and isinstance(row.get(answers), str):
        return Record((Turn("user", row[asks]), Turn("assistant", row[answers])), source)  # most rows
    before = _history(row)
    extra = _optional(row, INPUTS)
    reasoned = _optional(row, REASONING_NAMES)
    for part in (_answer_fault(row, answers, source), before, extra, reasoned):
        if isinstance(part, Reject):
            return part
    assert isinstance(before, list) and isinstance(extra, str) and isinstance(reasoned, str)
    asked = row[asks]
    if extra := extra.strip("\r\n").rstrip():
        asked = f"{asked.rstrip()}\n{extra}" if asked.strip() else extra
    answer = Turn("assistant", row[answers], {REASONING: reasoned} if reasoned else {})
    return _assembled(row, [*before, Turn("user", asked), answer], source)


def _answer_fault(row: Fields, name: str, source: str) -> Reject | None:
    fault = text_fault(row, name)
    if fault and isinstance(row.get(name), list):
        other = next((str(key) for key in row if str(key).startswith(f"{name}-") and isinstance(row[key], str)), "")
        line = answers_as_values(row, name, source.rpartition(":")[0])
        fix = f"--map {name}={other}" if other else line or "write the text of one of them into it"
        return replace(fault, reason=f"{fault.reason}; an export of Argilla?", fix=fix)
    return fault


def _history(row: Fields) -> list[Turn] | Reject:
    """Return the turns before the question: pairs of a question and an answer, or messages."""
    value = row.get("history")
    if is_empty(value):
        return []
    try:
        rounds = from_json(value)
    except ValueError as error:
        return Reject("D012", f"the field 'history' is a text that is no JSON ({error})", fix="write the list itself")
    if not isinstance(rounds, list):
        return Reject("D012", f"the field 'history' is {kind_of(rounds)}, not a list of rounds", fix=HISTORY_FIX)
    turns: list[Turn] = []
    for number, one in enumerate(rounds, start=1):
        if isinstance(one, dict):
            read = exchange_in(one) or read_message(one)
        elif isinstance(one, list) and len(one) == 2 and all(isinstance(text, str) for text in one):
            read = [Turn("user", one[0]), Turn("assistant", one[1])]
        else:
            return Reject("D012", f"round {number} of 'history' is no pair of texts", fix=HISTORY_FIX)
        if isinstance(read, Reject):
            return Reject(read.code, f"round {number} of 'history': {read.reason}", fix=read.fix)
        turns += read
    return turns


HISTORY_FIX = 'write [["question", "answer"], …]'


def _optional(row: Fields, names: Sequence[str]) -> str | Reject:
    """Return the one text under any of `names`; empty if none has one."""
    found, holder = "", ""
    if row.keys().isdisjoint(names):
        return found
    for name in names:
        value = row.get(name)
        if is_empty(value) or (name in REASONING_NAMES and is_switch(value)):
            continue
        if isinstance(value, list | dict) and name in SYSTEMS:
            value = system_text(value)
        elif name in INPUTS and isinstance(value, list) and all(isinstance(text, str) for text in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            return optional_fault(row, name) or ""
        if found and found != value:
            return Reject("D012", f"the fields '{holder}' and '{name}' hold two texts of one meaning", fix="join them")
        found, holder = value, name
    return found


def _asked_in_turns(row: Fields, answer: str, source: str) -> Record | Reject:
    """Return the record of TRL's conversational prompt and completion. Answers in the prompt are not taught."""
    if line := answers_as_values(row, answer, source.rpartition(":")[0]):
        return Reject("D012", f"the field '{answer}' is a list of Argilla's answers", fix=line)
    if beside := next((name for name in (*INPUTS, "history") if not is_empty(row.get(name))), ""):
        what = f"the field '{beside}' stands beside a prompt of turns, and is not read there"
        return Reject("D012", what, fix="write it into a turn of the prompt")
    sides = []
    for name, role in (("prompt", "user"), (answer, "assistant")):
        value = row.get(name)
        if not isinstance(value, list) and (fault := text_fault(row, name)):
            return fault
        turns = read_turns(value) if isinstance(value, list) else [Turn(role, str(value))]
        if isinstance(turns, Reject):
            return Reject(turns.code, f"'{name}', {turns.reason}", fix=turns.fix)
        sides.append(turns)
    reasoned = _optional(row, REASONING_NAMES)
    if isinstance(reasoned, Reject):
        return reasoned
    context = [Turn(turn.role, turn.content, turn.extra, False) if turn.taught else turn for turn in sides[0]]
    return _assembled(row, [*context, *with_reasoning(sides[1], reasoned)], source)


def _conversation(row: Fields, name: str, source: str) -> Record | Reject:
    if name not in row:
        return text_fault(row, name) or Reject("D010", f"no field '{name}'")
    try:
        value = turns_of(row[name])
    except ValueError:
        value = None
    if not isinstance(value, list):
        code = "D011" if row[name] is None else "D012"
        fix = pythons_own(row, name, source.rpartition(":")[0]) or 'write [{"role": "user", "content": "…"}, …]'
        return Reject(code, f"the field '{name}' is not a list of turns", fix=fix)
    turns = read_turns(value)
    if not isinstance(turns, Reject):
        turns = with_flags(turns, row)
    reasoned = _optional(row, REASONING_NAMES)
    for part in (turns, reasoned):
        if isinstance(part, Reject):
            return part
    assert isinstance(turns, list) and isinstance(reasoned, str)
    return _assembled(row, with_reasoning(turns, reasoned), source)


def _assembled(row: Fields, turns: list[Turn], source: str) -> Record | Reject:
    """Return the record of `turns`, with the row's own system text and tools."""
    system = _optional(row, SYSTEMS)
    if isinstance(system, Reject):
        return system
    head = turns.pop(0) if turns and turns[0].role == "system" else None
    tools: tuple[Fields, ...] = ()
    for holder in (row, head.extra if head else {}):
        for name in TOOLS:
            read = read_tools(holder, name) if holder.get(name) else ()
            if isinstance(read, Reject):
                return read
            tools += read
    if head:
        own = head.content
        system = own if system in ("", own) else "\n".join(part for part in (system, own) if part)
    if not any(turn.role == "assistant" for turn in turns):
        beside = next((name for name in ANSWERS if not is_empty(row.get(name))), "")
        kind = next((name for name in LISTS if name in row), "")
        fix = f"--map prompt={kind} takes the answer from '{beside}'" if beside and kind else ""
        return Reject("D016", "the conversation has no assistant turn", fix=fix)
    kwargs = read_kwargs(row) if KWARGS in row else {}
    taught = last_only(turns, row)
    for part in (kwargs, taught):
        if isinstance(part, Reject):
            return part
    assert isinstance(taught, list) and not isinstance(kwargs, Reject)
    unread = (
        tuple(name for name, value in head.extra.items() if name not in TOOLS and not is_empty(value)) if head else ()
    )
    return Record(tuple(taught), source, system or None, tools, kwargs, unread)
