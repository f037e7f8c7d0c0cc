"""Exports of other tools whose rows must be rewritten once, each with the command for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from lorafit.data.schema.fields import Fields, is_empty
from lorafit.data.schema.turns import CALL, speaker_of, speakers_in

OUT = "rows.jsonl"
AUTHOR = (
    "{'role': x['author']['role'], 'content': '\\n'.join(p for p in x['content'].get('parts') or [] if p == str(p))}"
)
JOINED = "(v if v == str(v) else ', '.join(map(str, v)))"


def export_of(row: Fields, where: str) -> tuple[str, str] | None:
    """Return (title, command that rewrites the rows) of a known export, or None."""
    for found in EXPORTS:
        if answer := found(row, where):
            return answer
    return None


def rewritten(where: str, row: str, each: str = "[q]", before: str = "", beside: str = "") -> str:
    """Return the command that writes `row` for each element of `each`.

    `row` is an expression of r, `each` one of every row q.
    """
    head = f"import json{beside}; {before}rows = {_rows_in(where)}; "
    return f'python -c "{head}[print(json.dumps({row})) for q in rows for r in {each}]" > {OUT}'


def _rows_in(where: str) -> str:
    """Return the expression that reads all rows of the file at `where`."""
    path = PurePath(where)
    suffix = "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:]).lower()
    if suffix == ".parquet":
        return f"__import__('pyarrow.parquet').parquet.read_table({where!r}).to_pylist()"
    if suffix not in (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"):
        return f"__import__('lorafit.data').data.raw_rows({where!r})"
    opened = f"open({where!r}, encoding='utf-8-sig')"
    if suffix.endswith(".gz"):
        opened = f"__import__('gzip').open({where!r}, 'rt', encoding='utf-8-sig')"
    lines = "[json.loads(l) for l in t.split('\\n') if l.strip()]"
    return f"(lambda t: json.loads(t) if t.lstrip()[:1] == '[' else {lines})({opened}.read())"


def _label_studio(row: Fields, where: str) -> tuple[str, str] | None:
    annotations, data = row.get("annotations"), row.get("data")
    if not isinstance(annotations, list) or not isinstance(data, dict):
        return None
    results = [one for each in annotations[:1] if isinstance(each, dict) for one in each.get("result") or []]
    answer = next((str(one["from_name"]) for one in results if isinstance(one, dict) and "from_name" in one), "")
    asked = next((str(name) for name, value in data.items() if isinstance(value, str)), "")
    each = "for a in r['annotations'][:1] for x in a['result'] for v in list(x['value'].values())[-1:]"
    values = f"{{x['from_name']: {JOINED} {each}}}"
    line = rewritten(where, f"{{**r['data'], **{values}}}")
    names = " ".join(
        f"--map {ours}={theirs}" for ours, theirs in (("instruction", asked), ("response", answer)) if theirs
    )
    return "the rows are an export of Label Studio", f"{line} && lorafit check {OUT} {names}"


def _tree(row: Fields, where: str) -> tuple[str, str] | None:
    prompt = row.get("prompt")
    if not isinstance(prompt, dict) or "replies" not in prompt:
        return None
    walk = "w = lambda m, p: [q for c in m['replies'] for q in w(c, p + [m])] if m.get('replies') else [p + [m]]; "
    turns = "{'messages': [{'role': x['role'], 'content': x['text']} for x in r]}"
    answered = "[p for p in w(q['prompt'], []) if len(p) > 1]"
    line = rewritten(where, turns, answered, walk)
    return "the rows are trees of conversations (OpenAssistant)", f"write each path as a row: {line}"


def _messages_of_trees(row: Fields, where: str) -> tuple[str, str] | None:
    if not {"message_id", "parent_id", "text", "role"} <= set(row):
        return None
    turns = "{'messages': [{'role': x['role'], 'content': x['text']} for x in r]}"
    line = rewritten(where, turns, "p(q)").replace(
        "; [print",
        "; m = {x['message_id']: x for x in rows}; up = {x['parent_id'] for x in rows}; "
        "w = lambda x: (w(m[x['parent_id']]) if x['parent_id'] in m else []) + [x]; "
        "p = lambda x: [w(x)] if x['message_id'] not in up and x['parent_id'] else []; [print",
    )
    return "the rows are single messages of conversations (OpenAssistant)", f"write each path as a row: {line}"


def _chat_history(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise ChatGPT's export: a mapping of messages, each with its parent."""
    if not isinstance(row.get("mapping"), dict) or not any(
        isinstance(node, dict) and "parent" in node for node in row["mapping"].values()
    ):
        return None
    walk = (
        "w = lambda m, n: (w(m, m[n]['parent']) if m[n].get('parent') else []) + [x for x in [m[n].get('message')] "
        "if x and x['author']['role'] in ('user', 'assistant') and any(map(str, x['content'].get('parts') or []))]; "
    )
    path = "w(r['mapping'], r.get('current_node') or list(r['mapping'])[-1])"
    line = rewritten(where, f"{{'messages': [{AUTHOR} for x in {path}]}}", before=walk)
    return "the rows are an export of ChatGPT's conversations", line


def _argilla(row: Fields, where: str) -> tuple[str, str] | None:
    name = next((name for name, value in row.items() if name.endswith(".responses") and isinstance(value, list)), "")
    if not name:
        return None
    ours = name.removesuffix(".responses")
    line = rewritten(where, f"{{**r, {ours!r}: (r[{name!r}] or [''])[0]}}")
    return f"the rows are an export of Argilla, whose answers are lists ('{name}')", line


def _squad(row: Fields, where: str) -> tuple[str, str] | None:
    answers = row.get("answers")
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list) or "question" not in row:
        return None
    line = rewritten(where, "{**r, 'answers': None, 'response': (r['answers']['text'] or [''])[0]}")
    what = "the rows are questions about a text (SQuAD), whose answers are lists"
    return what, f"{line} && lorafit check {OUT} --map instruction=question"


def _alternating(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise UltraChat's first form: a list of texts, user and assistant in turn, without other fields."""
    lists = [name for name, value in row.items() if _is_texts(value)]
    if len(lists) != 1 or {"prompt", "instruction", "question", "query", "input"} & set(row):
        return None
    turns = f"[{{'role': ('user', 'assistant')[i % 2], 'content': t}} for i, t in enumerate(r[{lists[0]!r}])]"
    line = rewritten(where, f"{{'messages': {turns}}}")
    return f"the turns in '{lists[0]}' are texts without roles", f"if user and assistant speak in turn: {line}"


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)


def pythons_own(row: Fields, name: str, where: str) -> str:
    """Return the command that parses a Python list written as text, as pandas writes one into CSV."""
    value = row.get(name)
    if not isinstance(value, str) or not value.lstrip().startswith(("[{'", '[{"')):
        return ""
    return rewritten(where, f"{{**r, {name!r}: ast.literal_eval(r[{name!r}])}}", beside=", ast")


def answers_as_values(row: Fields, name: str, where: str) -> str:
    """Return the command that takes the text out of Argilla's answers in field `name`; empty for other lists."""
    value = row.get(name)
    if not isinstance(value, list) or not value:
        return ""
    if all(isinstance(one, dict) and "value" in one and not {"role", "from"} & set(one) for one in value):
        return rewritten(where, f"{{**r, {name!r}: r[{name!r}][0]['value']}}")
    return ""


def _evals(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise OpenAI's evals whose ideal answers are lists."""
    ideal = row.get("ideal")
    if not isinstance(ideal, list) or not ideal or not all(isinstance(text, str) for text in ideal):
        return None
    line = rewritten(where, "{**r, 'ideal': r['ideal'] if r['ideal'] == str(r['ideal']) else r['ideal'][0]}")
    asks = "prompt" if speakers_in(row.get("input")) else "instruction"
    what = "the rows are OpenAI evals, whose ideal answers are lists"
    return what, f"train on the first of each: {line} && lorafit check {OUT} --map {asks}=input --map response=ideal"


def _function_calls(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise BFCL: questions, functions, and the values that each argument may have."""
    asked, declared, calls = row.get("question"), row.get("function"), row.get("ground_truth")
    if not isinstance(asked, list) or not asked or not isinstance(declared, list) or not speakers_in(asked[0]):
        return None
    what = "the rows are questions of BFCL, a test of function calls"
    if not isinstance(calls, list) or not calls:
        return (
            f"{what}, without their answers",
            "add 'ground_truth' from the file of that name in possible_answer, by id",
        )
    if len(asked) > 1 or not all(isinstance(call, dict) and len(call) == 1 for call in calls):
        return (
            what,
            'write each call into an answer: {"role": "assistant", "tool_calls": [{"name": …, "arguments": {…}}]}',
        )
    given = "{k: v[0] for k, v in a.items() if v and v[0] != ''}"
    said = f"[{{'name': n, 'arguments': {given}}} for c in r['ground_truth'] for n, a in c.items()]"
    turn = f"{{'role': 'assistant', 'content': '', 'tool_calls': {said}}}"
    line = rewritten(where, f"{{'messages': r['question'][0] + [{turn}], 'tools': r['function']}}")
    return what, f"train on the first value of each argument: {line}"


def _nested(row: Fields, where: str) -> tuple[str, str] | None:
    """Recognise logs of requests and answers, whose turns lie inside other fields."""
    places = [place for name, value in row.items() for place in _turns_in(value, f"r[{name!r}]", "r", 1)]
    roles = {role for _, found, _ in places for role in found}
    if not any(holder != "r" for _, _, holder in places):
        return None
    path = " + ".join(path for path, _, _ in places)
    if not {"assistant", CALL} & roles:
        said = next((f"r{name}" for name, value in _texts_in(row) if SAID.search(name) and value.strip()), "")
        if not said:
            return None
        path += f" + [{{'role': 'assistant', 'content': {said}}}]"
    beside = "".join(f", {ours!r}: {found}" for ours, found in _told_beside(row, "r", 0).items())
    line = rewritten(where, f"{{'messages': {path}{beside}}}")
    return "the turns stand inside of other fields of the rows", line


SAID = re.compile(r"(?i)\['(?:expected_?)?(?:outputs?|response|completion|answer|generations?|reference_outputs?)'\]")
"""Paths of texts that are an answer."""
TOLD = {
    "system": ("system", "system_instruction", "systemInstruction", "instructions"),
    "tools": ("tools", "functions", "toolConfig"),
}
"""What a request says beside its turns, and under which names."""


def _told_beside(value: Any, path: str, depth: int) -> dict[str, str]:
    """Return {system or tools: its expression} of what stands beside turns that lie inside of other fields."""
    if depth > 5 or not isinstance(value, Mapping) or speaker_of(value):
        return {}
    found = {
        ours: f"{path}.get({name!r})"
        for ours, names in TOLD.items()
        for name in reversed(names)
        if not is_empty(value.get(name)) and (ours == "system" or not isinstance(value[name], str))
    }
    for name, part in value.items():
        found = {**_told_beside(part, f"{path}[{name!r}]", depth + 1), **found}
    return found


def _texts_in(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping) and depth < 4:
        for name, part in value.items():
            yield from _texts_in(part, f"{path}[{name!r}]", depth + 1)


def _turns_in(value: Any, path: str, holder: str, depth: int) -> Iterator[tuple[str, list[str], str]]:
    """Yield (expression of a list of turns, their roles, what holds them), in the order of the fields."""
    if depth > 6:
        return
    if isinstance(value, Mapping):
        if role := speaker_of(value):
            yield f"[{path}]", [role], holder
            return
        for name, part in value.items():
            yield from _turns_in(part, f"{path}[{name!r}]", path, depth + 1)
    elif isinstance(value, list) and value:
        if roles := speakers_in(value):
            yield path, roles, holder
        else:
            yield from _turns_in(value[0], f"{path}[0]", path, depth + 1)


EXPORTS = (
    *(_label_studio, _tree, _messages_of_trees, _chat_history, _argilla, _squad, _evals, _function_calls),
    *(_alternating, _nested),
)


SPOKEN = re.compile(r"\A\s*Human:.*\bAssistant:", re.DOTALL)
SPLIT_SPOKEN = (
    "[{'role': 'user' if w == 'Human' else 'assistant', 'content': t.strip()} for w, t in "
    "re.findall(r'(?:^|\\n)\\s*(Human|Assistant):(.*?)(?=\\n\\s*(?:Human|Assistant):|\\Z)', r[NAME], re.S)]"
)


def better_answers(row: Fields, better: str, where: str) -> str:
    """Return the command that makes conversations of preference pairs; empty if a `--map` suffices."""
    value = row[better]
    turns = next((name for name in ("messages", "conversations") if isinstance(row.get(name), list)), "")
    if turns and isinstance(value, str | dict):
        said = f"r[{better!r}]" if isinstance(value, dict) else f"{{'role': 'assistant', 'content': r[{better!r}]}}"
        apart = "('chosen', 'rejected', 'preferred_output', 'non_preferred_output')"
        kept = f"{{k: v for k, v in r.items() if k not in {apart}}}"
        return rewritten(where, f"{{**{kept}, {turns!r}: r[{turns!r}] + [{said}]}}")
    if isinstance(value, str) and SPOKEN.search(value):
        spoken = SPLIT_SPOKEN.replace("NAME", repr(better))
        return rewritten(where, f"{{'messages': {spoken}}}", beside=", re")
    if isinstance(row.get("input"), dict):
        turns_of = f"{{'messages': r['input']['messages'] + r[{better!r}], 'tools': r['input'].get('tools') or []}}"
        return rewritten(where, turns_of)
    return ""
