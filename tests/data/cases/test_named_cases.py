# ruff: noqa: E501
"""The collected cases that stand in no other table, each under its own name: what is taught of the file, or the error.

`test_table.py` has the others, on every shape of chat template; `tools`, `splits`, `std` and `stdd` are folders and
Arrow files, which `test_containers.py` and `test_rows_say_all.py` make.
"""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import made_data as made
from lorafit.data import Template
from lorafit.errors import DataError

Row = dict[str, Any]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASK: Row = {"role": "user", "content": "Weather in Lima?"}
SAY: Row = {"role": "assistant", "content": "It is 21 C."}
FOUND: Row = {"role": "tool", "content": "21 C"}
PAIR = {"prompt": "2+2?", "completion": "4"}
TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
BETTER, WORSE = TALK[1:], [{"role": "assistant", "content": "5"}]


def called(**more: Any) -> Row:
    return {"role": "assistant", "content": "", "tool_calls": [CALL], **more}


def parquet(column: pa.Array) -> bytes:
    """A Parquet file of a prompt and this column."""
    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["2+2?"] * len(column), "completion": column}), out)
    return out.getvalue()


def agent(*, thinks: bool) -> list[Row]:
    thoughts = ({"reasoning_content": "Need the tool."}, {"reasoning_content": "Got it."}) if thinks else ({}, {})
    return [{"messages": [ASK, called(**thoughts[0]), FOUND, {**SAY, **thoughts[1]}], "tools": TOOLS}]


OLD = {
    "role": "assistant",
    "content": "Looking.",
    "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'},
}
SPOKEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'
MID = [
    *TALK,
    {"role": "system", "content": "From now on answer in French."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "De rien"},
]
INDENTED = "    return x\n    # end"
NO_THINK = [
    {"messages": [{"role": "system", "content": "/no_think"}, *TALK]},
    {"messages": [TALK[0], {**TALK[1], "content": "<think>\nEasy.\n</think>\n4"}]},
]
SYSTEMS = [
    {
        "messages": [
            {"role": "system", "content": "Answer in French."},
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": f"{n} oui"},
        ]
    }
    for n in range(4)
]

Taught = list[str] | str
READ: dict[tuple[str, str], tuple[str, bytes | list[Row], Taught, set[str]]] = {
    # (case, shape): (suffix, content, what is supervised in each row, the codes that are told)
    ("agent", "qwen3"): (".jsonl", agent(thinks=True), [f"<think>\nNeed the tool.\n</think>\n\n{SPOKEN_CALL}<|im_end|><think>\nGot it.\n</think>\n\nIt is 21 C.<|im_end|>"], set()),
    ("agent", "qwen2_5"): (".jsonl", agent(thinks=True), [f"{SPOKEN_CALL}<|im_end|>It is 21 C.<|im_end|>"], {"D027"}),
    ("agent", "gemma"): (".jsonl", agent(thinks=True), [], {"D024"}),
    ("agentplain", "qwen3"): (".jsonl", agent(thinks=False), ["<think>\n\n</think>\n\nIt is 21 C.<|im_end|>"], {"D025"}),
    ("agentplain", "chatml"): (".jsonl", agent(thinks=False), [], {"D013"}),
    ("assistants_only", "qwen2_5"): (".jsonl", [{"messages": [ASK, called()], "tools": TOOLS}], [f"{SPOKEN_CALL}<|im_end|>"], set()),
    ("assistants_only", "chatml"): (".jsonl", [{"messages": [ASK, called()], "tools": TOOLS}], [], {"D013"}),
    ("codefix", "chatml"): (".jsonl", [{"prompt": "def f(x):\n", "completion": "    return x\n"}], ["    return x<|im_end|>"], set()),
    ("codefix", "gemma"): (".jsonl", [{"prompt": "def f(x):\n", "completion": "    return x\n"}], ["return x<end_of_turn>"], {"D027"}),
    ("contentcall", "qwen2_5"): (".jsonl", [{"messages": [ASK, called(content="Let me look."), FOUND, SAY]}], [f"Let me look.\n{SPOKEN_CALL}<|im_end|>It is 21 C.<|im_end|>"], set()),
    ("contentcall", "chatml"): (".jsonl", [{"messages": [ASK, called(content="Let me look."), FOUND, SAY]}], ["Let me look.<|im_end|>It is 21 C.<|im_end|>"], {"D027", "D029"}),
    ("ctk", "chatml"): (".jsonl", [{"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}}], ["4<|im_end|>"], {"D054"}),
    ("fc_nocontent", "qwen2_5"): (".jsonl", [{"messages": [ASK, {"role": "assistant", "function_call": OLD["function_call"]}, {"role": "function", "name": "weather", "content": "21"}, SAY]}], [f"{SPOKEN_CALL}<|im_end|>It is 21 C.<|im_end|>"], set()),
    ("funccall2", "qwen2_5"): (".jsonl", [{"messages": [ASK, OLD, {**FOUND, "role": "function", "name": "weather"}, SAY], "functions": [TOOLS[0]["function"]]}], [f"Looking.\n{SPOKEN_CALL}<|im_end|>It is 21 C.<|im_end|>"], set()),
    ("funccall2", "harmony"): (".jsonl", [{"messages": [ASK, OLD, {**FOUND, "role": "function", "name": "weather"}, SAY], "functions": [TOOLS[0]["function"]]}], [' to=functions.weather<|message|>{"city": "Lima"}<|call|><|channel|>final<|message|>It is 21 C.<|return|>'], {"D027"}),
    ("greet", "chatml"): (".jsonl", [{"messages": [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hello?"}, *TALK]}], ["Hello?<|im_end|>4<|im_end|>"], {"D018"}),
    ("greet2", "chatml"): (".jsonl", [{"messages": [{"role": "assistant", "content": "Hello?"}, *TALK]}], ["4<|im_end|>"], {"D018"}),
    ("htmls", "chatml"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "content": "<s>old</s> new"}]}], ["<s>old</s> new<|im_end|>"], set()),
    ("leadws", "chatml"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "content": INDENTED}]}], [f"{INDENTED}<|im_end|>"], set()),
    ("leadws", "gemma"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "content": INDENTED}]}], ["return x\n    # end<end_of_turn>"], {"D027"}),
    ("midsystem", "qwen2_5"): (".jsonl", [{"messages": MID}], ["4<|im_end|>De rien<|im_end|>"], {"D017"}),
    ("midsystem", "harmony"): (".jsonl", [{"messages": MID}], [], {"D017", "D039"}),
    ("midsystem", "gemma"): (".jsonl", [{"messages": MID}], [], {"D017", "D024"}),
    ("nothink", "smollm3"): (".jsonl", NO_THINK, ["4<|im_end|>", "<think>\nEasy.\n</think>\n4<|im_end|>"], set()),
    ("nothink", "qwen3"): (".jsonl", NO_THINK, ["<think>\n\n</think>\n\n4<|im_end|>", "<think>\nEasy.\n</think>\n\n4<|im_end|>"], set()),
    ("prefixflag", "chatml"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "prefix": True, "eot": False}]}], ["4<|im_end|>"], {"D037"}),
    ("prompttools", "qwen2_5"): (".jsonl", [{"prompt": "Weather in Lima?", "completion": "CALL", "tools": TOOLS}], ["CALL<|im_end|>"], set()),
    ("prompttools", "chatml"): (".jsonl", [{"prompt": "Weather in Lima?", "completion": "CALL", "tools": TOOLS}], ["CALL<|im_end|>"], {"D029"}),
    ("rc_reasoning", "harmony"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "reasoning": "Two twos."}]}], ["<|channel|>analysis<|message|>Two twos.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"], set()),
    ("rc_reasoning_content", "chatml"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "reasoning_content": "Two twos."}]}], ["4<|im_end|>"], {"D027"}),
    ("rc_thinking", "qwen3"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "thinking": "Two twos."}]}], ["<think>\nTwo twos.\n</think>\n\n4<|im_end|>"], set()),
    ("sysrows", "chatml"): (".jsonl", SYSTEMS, [f"{n} oui<|im_end|>" for n in range(4)], {"D049"}),
    ("think", "harmony"): (".jsonl", [{"messages": [TALK[0], {**TALK[1], "content": "<think>\nTwo.\n</think>\n\n4"}]}], ["<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"], {"D055"}),
    ("tools_strargs", "qwen2_5"): (".jsonl", [{"messages": [ASK, called(tool_calls=[{**CALL, "function": {"name": "weather", "arguments": json.dumps(arguments)}}])]} for arguments in ({"city": "Lima"}, {"zone": "UTC"})], [f"{SPOKEN_CALL}<|im_end|>", f"{SPOKEN_CALL}<|im_end|>".replace("city", "zone").replace("Lima", "UTC")], {"D033"}),
    # files
    ("bom", "chatml"): (".jsonl", b"\xef\xbb\xbf" + made.jsonl([PAIR]), ["4<|im_end|>"], {"D009"}),
    ("bool", ""): (".jsonl", [{**PAIR, "completion": True}], [], {"D012"}),
    ("bytes", ""): (".parquet", parquet(pa.array([b"4"])), [], {"D012"}),
    ("cat", ""): (".parquet", parquet(pa.array(["4"]).dictionary_encode()), ["4"], set()),
    ("conversation", ""): (".jsonl", [{"conversation": TALK}], ["4"], set()),
    ("crlf", ""): (".jsonl", b'{"prompt":"2+2?","completion":"4\\r\\n"}\r\n', ["4\r\n"], {"D009"}),
    ("emptycols", ""): (".csv", b"prompt;completion;;\n2+2?;4;;\n;;;\n", ["4"], {"D009"}),
    ("emptyrows", ""): (".csv", b"prompt;completion\n2+2?;4\n;\n", ["4"], {"D009"}),
    ("escaped", ""): (".jsonl", b'"{\\"prompt\\": \\"2+2?\\"}"\n', [], {"D002"}),
    ("excel_semicolon", ""): (".csv", b'\xef\xbb\xbfprompt;completion\r\n"Zwei\r\nZeilen?";ja\r\n', ["ja"], {"D009"}),
    ("float", ""): (".parquet", parquet(pa.array([4.0])), [], {"D012"}),
    ("image", ""): (".jsonl", [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}, TALK[1]]}], [], {"D012"}),
    ("index", ""): (".csv", b",prompt,completion\n0,2+2?,4\n1,3+3?,6\n", ["4", "6"], {"D009"}),
    ("messages", ""): (".csv", b'id,messages\n1,"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""4""}]"\n', ["4"], {"D037"}),
    ("mysql", ""): (".csv", b'prompt,completion\n"say \\"hi\\"","ok"\n2+2?,4\n', ["4"], {"D053"}),
    ("nan", ""): (".jsonl", b'{"prompt":"2+2?","completion":NaN}\n', [], {"D012"}),
    ("nonascii_only", ""): (".csv", b'prompt,completion\nhi,"a, b"\n', ["a, b"], set()),
    ("num", ""): (".jsonl", [{**PAIR, "completion": 4}], [], {"D012"}),
    ("objresp", ""): (".jsonl", [{**PAIR, "completion": {"value": 2}}], [], {"D012"}),
    ("pretty", ""): (".jsonl", json.dumps(PAIR, indent=1).encode(), "each row spans several lines", set()),
    ("python", ""): (".jsonl", b"{'prompt': '2+2?', 'completion': '4'}\n", "holds Python's objects", set()),
    ("quoted", ""): (".tsv", b'prompt\tcompletion\n"Hello" she said\tok\n2+2?\t4\n', ["4"], {"D053"}),
    ("semi_text", ""): (".csv", b'prompt;completion\n"a; b" or c;x\n2+2?;4\n', ["4"], {"D053"}),
    ("sep", ""): (".csv", b"sep=;\nprompt;completion\n2+2?;4\n", ["4"], set()),
    ("sgsys", "chatml"): (".jsonl", [{"system": "Be brief.", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}], ["4<|im_end|>"], set()),
    ("spacequote", ""): (".csv", b'prompt, completion\nhi, "a, b"\n2+2?, 4\n', [" 4"], {"D008"}),
    ("train_msgs", ""): (".jsonl", [{"messages": TALK}], ["4"], set()),
    ("twoanswers", ""): (".jsonl", [{"prompt": "17*3?", "response": "DRAFT", "answer": "51"}], [], {"D038"}),
    ("u2028", ""): (".jsonl", '{"prompt": "a\u2028b", "completion": "x\u2028y"}\n'.encode(), ["x\u2028y"], set()),
    ("unclosed", ""): (".csv", b'prompt,completion\n"5 inch,yes\n2+2?,4\n', [], {"D053"}),
    ("upper", ""): (".jsonl", [{"Prompt": "2+2?", "Completion": "4"}], ["4"], set()),
    ("utf16", ""): (".csv", "prompt\tcompletion\n2+2?\t4\n".encode("utf-16"), ["4"], {"D009"}),
    ("valid_other", ""): (".jsonl", [{"conversations": [{"from": "human", "value": "9+9?"}, {"from": "gpt", "value": "18"}]}], ["18"], set()),
    # refused before a row is read
    ("argilla", ""): (".jsonl", [{"instruction": "2+2?", "response": [{"value": "4"}], "response-suggestion": "4"}], [], {"D012"}),
    ("cot", ""): (".jsonl", [{"Question": "17*3?", "Complex_CoT": "So.", "Response": "51"}], "--map instruction=Question --map response=Response", set()),
    ("cp1252", ""): (".csv", "prompt;completion\nGrüße?;ja\n".encode("cp1252"), [], {"D004"}),
    ("data", ""): (".xlsx", b"PK\x03\x04", "save the sheet as 'CSV UTF-8'", set()),
    ("dictlists", ""): (".json", b'{"prompt": ["2+2?", "3+3?"], "completion": ["4", "6"]}', "a table by columns", set()),
    ("dpo", ""): (".jsonl", [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}], "--map completion=chosen", set()),
    ("dpo2", ""): (".jsonl", [{"chosen": TALK, "rejected": [TALK[0], *WORSE]}], "--map messages=chosen", set()),
    ("glaive", ""): (".jsonl", [{"system": "S", "chat": "USER: 2+2?\n\n\nASSISTANT: 4 <|endoftext|>"}], "a whole conversation as one text", set()),
    ("io", ""): (".jsonl", [{"input": "2+2?", "output": "4"}], "--map instruction=input", set()),
    ("labelstudio", ""): (".jsonl", [{"data": {"prompt": "2+2?"}, "annotations": [{"result": [{"value": {"text": ["4"]}}]}]}], "export of Label Studio", set()),
    ("oasst", ""): (".jsonl", [{"prompt": {"text": "2+2?", "role": "prompter", "replies": []}}], "trees of conversations", set()),
    ("openaipref", ""): (".jsonl", [{"input": {"messages": TALK[:1]}, "preferred_output": BETTER, "non_preferred_output": WORSE}], "preference data", set()),
    ("pandas_cols", ""): (".json", b'{"prompt": {"0": "2+2?", "1": "3+3?"}, "completion": {"0": "4", "1": "6"}}', "a table by columns", set()),
    ("qa", ""): (".jsonl", [{"question": "2+2?", "answer": "4", "context": "Sum."}], "--map instruction=question", set()),
    ("tabs", ""): (".txt", b"a\tb\n", "name it .csv or .tsv", set()),
    ("text", ""): (".jsonl", [{"text": "Once upon a time."}], "--map text=text", set()),
    ("wrapped", ""): (".json", json.dumps({"version": "1", "data": [PAIR]}).encode(), "whose 'data' holds the rows", set()),
    ("wrapped_pretty", ""): (".json", json.dumps({"version": "1", "data": [PAIR]}, indent=1).encode(), "whose 'data' holds the rows", set()),
}  # fmt: skip
ELSEWHERE = {"ent", "splits", "std", "stdd", "tools"}
"""`ent` needs a base with a config (D048 in test_fixes.py); the others are folders and Arrow files."""
NAMES = """
agent agentplain ai_human argilla argstr assistants_only axo bom bool bytes cat codefix contentcall conversation cot
cp1252 crlf ctk data developer dictlists dolly dpo dpo2 emoji emptycols emptyrows ent escaped excel_semicolon
fc_nocontent float fromvalue_in_messages funccall funccall2 function gemini glaive greet greet2 history htmls image
index io ipython labelstudio leadws messages midsystem multi mysql nan nonascii_only nothink nullargs num oasst objresp
openaipref orca pandas_cols parts plain prefixflag pretty promptinput prompttools python qa quoted rc_reasoning
rc_reasoning_content rc_thinking resp_parts semi_text sep sgcalls sgsys sgtools sgtools2 spacequote splits std stdd
swift sysrows system tabs text think tool toolobj tools tools_strargs trail train_msgs trlprompt twoanswers u2028
unclosed upper utf16 valid_other weight wrapped wrapped_pretty xlam
""".split()
"""Every case that was collected."""


def test_every_collected_case_has_a_test_of_its_name() -> None:
    table = (Path(__file__).parent / "test_table.py").read_text(encoding="utf-8")
    here = {case for case, _ in READ} | ELSEWHERE
    assert [name for name in NAMES if name not in here and f'    "{name}": ' not in table] == []


@pytest.mark.parametrize(("case", "shape"), READ, ids=["-".join(filter(None, key)) for key in READ])
def test_the_case(tmp_path: Path, templates: dict[str, Template], case: str, shape: str) -> None:
    suffix, content, expected, codes = READ[case, shape]
    path = made.write(tmp_path / f"rows{suffix}", content)
    if isinstance(expected, str):
        with pytest.raises(DataError) as caught:
            made.prepared(path, holdout=0.0)
        assert expected in str(caught.value)
        return
    template = templates[shape] if shape else None
    result = made.prepared(path, template, holdout=0.0, on_bad="drop")
    rows = result.train
    assert made.codes(result) - {"D035", "D036", "D028", "D049"} == codes - {"D049"}
    if template is None:
        assert [rows.record(place).response for place in range(len(rows))] == expected
        return
    ids = [[one for one, kept in zip(rows.ids(at).tolist(), rows.mask(at).tolist()) if kept] for at in range(len(rows))]
    assert [template.tokenizer.decode(one, skip_special_tokens=False) for one in ids] == expected
