"""Random conversations mean the same in every file and spelling: the same ids, the same loss mask."""

import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_data as made
from lorafit.data import Template, parse_rows

Exchange = tuple[str, str]
Row = dict[str, Any]
BITS = [
    *(
        "ask",
        "say",
        "Grüße",
        "世界",
        "👨‍👩‍👧",
        "\n",
        "\n\n",
        "  ",
        "\t",
        "{",
        "[1, 2]",
        '"',
        "'",
        "a;b",
        "c,d",
        "|",
        "---",
        "<b>",
    ),
    *("null", "NaN", "007", "2024-01-01", "=1+1", "\u2028", "e\u0301", "\\n", "{{ x }}", "```py\nx=1\n```", "# head"),
]


def conversations(seed: int) -> list[tuple[str, list[Exchange]]]:
    """Random (system text or nothing, exchanges)."""
    chance = random.Random(seed)

    def text() -> str:
        return "".join(chance.choice(BITS) + chance.choice(["", " "]) for _ in range(chance.randrange(1, 7))) + "x"

    return [
        (text() if chance.random() < 0.5 else "", [(text(), text()) for _ in range(chance.randrange(1, 4))])
        for _ in range(24)
    ]


def table(rows: list[Row], separator: str, encoding: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode(encoding)


def parquet(rows: list[Row]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def files(talks: list[tuple[str, list[Exchange]]]) -> Iterator[tuple[str, bytes]]:
    """The same conversations as (name, content) of files."""
    turns = [[turn for pair in pairs for turn in zip(("user", "assistant"), pair)] for _, pairs in talks]
    heads = [[("system", system)] if system else [] for system, _ in talks]
    openai = [
        {"messages": [{"role": role, "content": text} for role, text in [*head, *told]]}
        for head, told in zip(heads, turns)
    ]
    names = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"system": system, "conversations": [{"from": names[role], "value": text} for role, text in told]}
        for (system, _), told in zip(talks, turns)
    ]
    alpaca = [
        {"system": system, "history": json.dumps(pairs[:-1]), "instruction": pairs[-1][0], "output": pairs[-1][1]}
        for system, pairs in talks
    ]
    yield "openai.jsonl", made.jsonl(openai)
    yield "openai.parquet", parquet(openai)
    yield "openai.csv", table([{"messages": json.dumps(row["messages"])} for row in openai], ",", "utf-8")
    yield "sharegpt.json", json.dumps(sharegpt, indent=1).encode()
    yield "alpaca.jsonl", made.jsonl(alpaca)
    yield "alpaca.csv", table(alpaca, ";", "utf-8-sig")
    yield "alpaca.tsv", table(alpaca, "\t", "utf-16")
    yield "alpaca.parquet", parquet(alpaca)


@pytest.mark.parametrize("shape", ["qwen2_5", "smollm3"])
def test_a_conversation_is_the_same_in_every_file(tmp_path: Path, templates: dict[str, Template], shape: str) -> None:
    hashes = {}
    for name, content in files(conversations(len(shape))):
        rows = made.prepared(made.write(tmp_path / name, content), templates[shape], holdout=0.0, on_bad="drop").train
        assert len(rows) == 24, name
        hashes[name] = rows.content_hash
    assert len(set(hashes.values())) == 1, hashes


def spoken(form: str, seed: int) -> list[Row]:
    """Random turns with calls, several at once too, as messages of this form."""
    chance, messages = random.Random(seed), list[Row]()
    for exchange in range(3):
        messages.append(said(form, "user", f"ask {exchange}"))
        for step in range(chance.randrange(3)):
            calls = [
                (
                    f"call{exchange}{step}{place:04}",
                    f"f{place}",
                    {"city": chance.choice(["Lima", 2, ["a"], {"k": "v"}])},
                )
                for place in range(chance.randrange(1, 4))
            ]
            text = chance.choice(["", "Let me look."])
            messages += calling(form, text, calls) + results(form, [(call[0], f"21 {call[1]}") for call in calls])
        messages.append(said(form, "assistant", f"say {exchange}"))
    return messages


def said(form: str, role: str, text: str) -> Row:
    if form == "LangChain":
        return {"type": {"user": "human", "assistant": "ai"}[role], "content": text}
    if form == "Gemini":
        return {"role": {"user": "user", "assistant": "model"}[role], "parts": [{"text": text}]}
    kind = {"Anthropic": "text", "Responses": f"{'in' if role == 'user' else 'out'}put_text"}.get(form)
    return {"role": role, "content": [{"type": kind, "text": text}] if kind else text}


def calling(form: str, text: str, calls: list[tuple[str, str, Row]]) -> list[Row]:
    if form == "Responses":
        items = [{"type": "function_call", "call_id": i, "name": n, "arguments": json.dumps(a)} for i, n, a in calls]
        return ([said(form, "assistant", text)] if text else []) + items
    if form == "LangChain":
        return [{"type": "ai", "content": text, "tool_calls": [{"id": i, "name": n, "args": a} for i, n, a in calls]}]
    if form == "OpenAI":
        listed = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for i, n, a in calls
        ]
        return [{"role": "assistant", "content": text or None, "tool_calls": listed}]
    parts: list[Row] = [{"type": "tool_use", "id": i, "name": n, "input": a} for i, n, a in calls]
    if form == "Gemini":
        parts = [{"functionCall": {"id": i, "name": n, "args": a}} for i, n, a in calls]
    head = said(form, "assistant", text)
    name = "parts" if form == "Gemini" else "content"
    return [{**head, name: [*(head[name] if text else []), *parts]}]


def results(form: str, found: list[tuple[str, str]]) -> list[Row]:
    if form == "Responses":
        return [{"type": "function_call_output", "call_id": i, "output": text} for i, text in found]
    if form == "Anthropic":
        content = [{"type": "tool_result", "tool_use_id": i, "content": text} for i, text in found]
        return [{"role": "user", "content": content}]
    if form == "Gemini":
        return [{"role": "user", "parts": [{"functionResponse": {"id": i, "response": text}} for i, text in found]}]
    return [
        {("type" if form == "LangChain" else "role"): "tool", "tool_call_id": i, "content": text} for i, text in found
    ]


@pytest.mark.parametrize("form", ["Responses", "Anthropic", "Gemini", "LangChain"])
def test_calls_are_the_same_in_every_form_of_messages(templates: dict[str, Template], form: str) -> None:
    for seed in range(6):
        one, other = (parse_rows([{"messages": spoken(name, seed)}])[0] for name in ("OpenAI", form))
        for shape in ("qwen2_5", "llama3", "harmony", "qwen35"):
            first, second = (templates[shape].encode(templates[shape].with_calls_apart(row)) for row in (one, other))
            assert (first.ids, first.mask, first.problems) == (second.ids, second.mask, second.problems)
