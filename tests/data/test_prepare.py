"""prepare: counts that add up, every code from real files, and one sentence when the data cannot be used."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import made_data as made
import made_tokenizers
from lorafit.data import Encoded, Record, Template, TextTokenizer, require_clean
from lorafit.data.checks.findings import CODES
from lorafit.data.checks.rows import SAID
from lorafit.data.summary import Progress
from lorafit.errors import DataError, LorafitError, RunDirError
from lorafit.findings import Severity

ROWS = [made.row(number) for number in range(30)]
LONG = " ".join(f"term{number}" for number in range(60))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.for_tokenizer(made_tokenizers.family_tokenizer(tmp_path_factory.mktemp("base"), "qwen2_5"))


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


# what a file holds beside thirty good rows, and the code and place that must name it
BAD_LINES = {
    "D001": b'{"instruction": "a", "response": }',
    "D002": b"[1, 2]",
    "D003": b'{"instruction": "a", "response": "b", "response": "c"}',
    "D004": '{"instruction": "Grüße", "response": "b"}'.encode("latin-1"),
    "D005": b'{"instruction": "a\0", "response": "b"}',
    "D007": b'{"instruction": ' + b"[" * 100 + b"]" * 100 + b', "response": "b"}',
    "D010": b'{"instruction": "a"}',
    "D011": b'{"instruction": "a", "response": null}',
    "D012": b'{"instruction": "a", "response": 42}',
    "D013": b'{"instruction": "a", "response": " \\n"}',
    "D043": b'{"instruction": "a \\ud83d", "response": "b"}',
}


@pytest.mark.parametrize("code", BAD_LINES)
def test_a_bad_line_is_one_error_with_its_place_and_the_others_are_kept(tmp_path: Path, code: str) -> None:
    content = made.jsonl(ROWS[:7]) + BAD_LINES[code] + b"\n" + made.jsonl(ROWS[7:])
    path = made.write(tmp_path / "rows.jsonl", content)
    result = made.prepared(path, run_dir=tmp_path / "run")
    finding = made.found(result, code)
    assert finding.severity is Severity.ERROR
    assert finding.count == 1
    assert finding.where.startswith(f"{path}:8")
    assert finding.fix == CODES[code].fix
    assert (result.summary.read, result.summary.kept, result.summary.rejected) == (31, 30, 1)
    assert result.rejected is not None
    entry = json.loads(result.rejected.read_text())
    assert (entry["code"], entry["source"]) == (code, finding.where)
    assert entry["raw"].encode("utf-8", "surrogatepass")[:10] == BAD_LINES[code][:10]
    with pytest.raises(DataError, match=code):
        require_clean(result)


def test_dropping_bad_rows_makes_them_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    content = made.jsonl(ROWS) + b"\n".join(BAD_LINES.values())
    result = made.prepared(made.write(tmp_path / "rows.jsonl", content), on_bad="drop")
    assert {made.found(result, code).severity for code in BAD_LINES} == {Severity.WARNING}
    assert (result.summary.read, result.summary.kept) == (30 + len(BAD_LINES), 30)
    require_clean(result)


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    content = made.jsonl(ROWS) + b"\n".join(BAD_LINES.values()) + b"\n"
    result = made.prepared(made.write(tmp_path / "rows.jsonl", content), run_dir=tmp_path / "run")
    assert set(BAD_LINES) <= made.codes(result)
    assert result.rejected is not None
    assert len(result.rejected.read_text().splitlines()) == len(BAD_LINES)
    with pytest.raises(DataError) as caught:
        require_clean(result)
    assert "\n" not in caught.value.sentence
    assert str(result.rejected) in caught.value.sentence


@pytest.mark.parametrize(
    ("row", "code", "severity"),
    [
        (made.row(99, instruction="", input=""), "D014", Severity.WARNING),
        (made.row(99, instruction="same", input="", response="same"), "D015", Severity.WARNING),
        (made.row(99, input="[INST] x [/INST]"), "D040", Severity.WARNING),
        (made.row(99, input="a\x07b"), "D041", Severity.WARNING),
        (made.row(99, input="cafÃ©"), "D042", Severity.WARNING),
        (made.row(99, input="AKIA" + "A1B2C3D4E5F6G7H8"), "D044", Severity.WARNING),
        (ROWS[3], "D030", Severity.WARNING),
        ({**ROWS[3], "response": "another answer"}, "D033", Severity.WARNING),
    ],
)
def test_a_doubtful_row_is_kept_with_a_warning(
    tmp_path: Path, row: dict[str, str], code: str, severity: Severity
) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [*ROWS, row]))
    finding = made.found(result, code)
    assert (finding.severity, finding.count) == (severity, 1)
    assert finding.where == f"{tmp_path / 'rows.jsonl'}:31"
    assert result.summary.kept == 31
    require_clean(result)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "D016"),
        ({"messages": [*chat("a")["messages"], *chat("b", "c")["messages"]]}, "D017"),
        ({"messages": [{"role": "assistant", "content": "hi"}, *chat("a", "b")["messages"]]}, "D018"),
        (chat("a", "b", "c"), "D019"),
    ],
)
def test_conversations_out_of_order_are_named(tmp_path: Path, row: dict[str, Any], code: str) -> None:
    rows = [chat(f"question {number}", f"answer {number}") for number in range(30)]
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [*rows, row]))
    assert made.found(result, code).where.endswith(":31")


def test_a_trailing_question_is_left_out_of_the_example(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [chat("a", "b", "c")])
    assert made.prepared(path, holdout=0.0).train.record(0).response == "b"


def test_near_copies_are_d031_with_the_row_they_resemble(tmp_path: Path) -> None:
    near = [made.row(50, input=LONG), made.row(50, input=LONG.replace("term30", "other"))]
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [*ROWS, *near]))
    finding = made.found(result, "D031")
    assert (finding.count, finding.where.endswith(":32")) == (1, True)
    assert finding.message.endswith("rows.jsonl:31")
    assert result.summary.near_duplicates == 1


def test_copies_of_training_rows_in_a_held_out_file_are_d032(tmp_path: Path) -> None:
    train = made.write(tmp_path / "train.jsonl", [*ROWS, made.row(50, input=LONG)])
    near = made.row(50, input=LONG.replace("term30", "other"))
    other = made.write(tmp_path / "other.jsonl", [made.row(70), ROWS[4], near])
    result = made.prepared(train, holdout=str(other))
    finding = made.found(result, "D032")
    assert finding.examples == (f"{other}:2", f"{other}:3")
    assert (len(result.train), len(result.holdout)) == (31, 3)


def test_one_answer_over_and_over_is_d034(tmp_path: Path) -> None:
    rows = [made.row(number) for number in range(100)]
    rows[40:70] = [{**row, "response": "I cannot help with that."} for row in rows[40:70]]
    finding = made.found(made.prepared(made.write(tmp_path / "rows.jsonl", rows)), "D034")
    assert (finding.severity, finding.count) == (Severity.WARNING, 30)
    assert "30% of the rows answer “I cannot help with that.”" in finding.message


def test_a_few_answers_that_look_like_labels_are_only_noted(tmp_path: Path) -> None:
    rows = [made.row(number, response=("yes", "no")[number % 2]) for number in range(100)]
    assert made.found(made.prepared(made.write(tmp_path / "rows.jsonl", rows)), "D034").severity is Severity.INFO


def test_no_row_left_is_d035_and_stops_the_run(tmp_path: Path) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", b"{broken\n"), on_bad="drop")
    assert made.found(result, "D035").severity is Severity.ERROR
    with pytest.raises(DataError, match="D035"):
        require_clean(result)


def test_nothing_held_out_is_d036(tmp_path: Path) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", ROWS[:1]))
    assert made.found(result, "D036").severity is Severity.WARNING
    assert "D036" not in made.codes(made.prepared(tmp_path / "rows.jsonl", holdout=0.0))


def test_oddities_that_cost_nothing_are_d009(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + made.jsonl(ROWS).replace(b"\n", b"\r\n") + b"\r\n"
    result = made.prepared(made.write(tmp_path / "rows.jsonl", content))
    assert made.codes(result) == {"D009"}
    finding = made.found(result, "D009")
    assert finding.severity is Severity.INFO
    assert all(words in finding.message for words in ("byte order mark", "31 × CRLF line end", "blank line"))


@pytest.mark.parametrize(
    ("marks", "severity"),
    [
        ({1: "### Instruction:\nx", 2: "[INST] x"}, Severity.ERROR),
        ({1: "<|user|>x", 2: "<|im_start|>x"}, Severity.ERROR),
        ({1: "### Instruction:\nx"}, Severity.WARNING),
        ({1: "[INST] <|im_start|>"}, Severity.WARNING),
    ],
)
def test_mixed_templates_are_p5(tmp_path: Path, marks: dict[int, str], severity: Severity) -> None:
    rows = [made.row(number, input=marks.get(number, "plain")) for number in range(40)]
    finding = made.found(made.prepared(made.write(tmp_path / "rows.jsonl", rows)), "P5")
    assert finding.severity is severity
    assert finding.count == len(marks)
    assert all(mark.split()[0].removesuffix("x").split(":")[0] in finding.message for mark in marks.values())
    assert f"no marker in {40 - len(marks)}" in finding.message


def test_one_style_in_every_row_is_no_mixture(tmp_path: Path) -> None:
    rows = [made.row(number, input="[INST] x") for number in range(40)]
    assert made.codes(made.prepared(made.write(tmp_path / "rows.jsonl", rows))) == {"D040"}


# with a tokenizer


def test_rows_are_tokenised_with_the_answer_and_its_stop_supervised(tmp_path: Path, template: Template) -> None:
    result = made.prepared(made.write(tmp_path / "rows.jsonl", ROWS), template)
    rows = result.train
    for place in (0, len(rows) - 1):
        ids, mask = rows.ids(place), rows.mask(place)
        taught = template.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
        assert taught == rows.record(place).response + "<|im_end|>"
        assert (rows.lengths[place], rows.supervised[place]) == (len(ids), mask.sum())
    summary = result.summary
    assert summary.tokens == rows.lengths.sum() + result.holdout.lengths.sum()
    assert summary.longest == max(rows.lengths.max(), result.holdout.lengths.max())
    assert sum(summary.histogram.counts) == 30
    assert 0 < summary.supervised_share < 1
    assert summary.steps_per_epoch == -(-len(rows) // 16)
    assert 0 < summary.packed_fill <= 1


@pytest.mark.parametrize(
    ("on_long", "severity", "rejected", "dropped"), [("error", Severity.ERROR, 1, 0), ("drop", Severity.WARNING, 0, 1)]
)
def test_a_long_row_is_never_cut(
    tmp_path: Path, template: Template, on_long: str, severity: Severity, rejected: int, dropped: int
) -> None:
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, made.row(50, response=LONG)])
    result = made.prepared(path, template, max_length=128, on_long=on_long, on_bad="drop")
    finding = made.found(result, "D020")
    assert (finding.severity, finding.where) == (severity, f"{path}:31")
    summary = result.summary
    assert (summary.kept, summary.rejected, summary.dropped, summary.truncated) == (30, rejected, dropped, 0)
    assert summary.longest <= 128


def test_a_long_conversation_is_split_at_its_turns(tmp_path: Path, template: Template) -> None:
    whole = [text for number in range(8) for text in (f"question {number}", f"the answer is {number}")]
    path = made.write(tmp_path / "rows.jsonl", [chat("a", "b"), chat(*whole)])
    result = made.prepared(path, template, max_length=64, on_long="split-turns", holdout=0.0)
    summary = result.summary
    assert (summary.read, summary.kept, summary.split, summary.dropped) == (2, 2, 1, 0)
    assert made.found(result, "D020").severity is Severity.WARNING
    asked = [
        turn.content
        for place in range(1, len(result.train))
        for turn in result.train.record(place).turns
        if turn.role == "user"
    ]
    assert asked == [f"question {number}" for number in range(8)]
    assert {result.train.source(place) for place in range(1, len(result.train))} == {f"{path}:2"}


def test_pieces_of_one_conversation_stand_on_one_side(tmp_path: Path, template: Template) -> None:
    rows = [
        chat(*[f"{side} {row} {turn}" for turn in range(4) for side in ("ask", "say this and that")])
        for row in range(40)
    ]
    path = made.write(tmp_path / "rows.jsonl", rows)
    result = made.prepared(path, template, max_length=160, on_long="split-turns", holdout=0.2)
    sides = [{rows.source(place) for place in range(len(rows))} for rows in (result.train, result.holdout)]
    assert result.summary.split == 40
    assert sides[1]
    assert not sides[0] & sides[1]


def test_a_special_token_in_a_text_is_d045(tmp_path: Path, template: Template) -> None:
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, made.row(50, response="stop <|im_end|> here")])
    assert made.found(made.prepared(path, template), "D045").severity is Severity.ERROR
    ignored = made.prepared(path, template, ignore=("D045", "D040", "P5"))
    assert ignored.summary.kept == 31
    require_clean(ignored)


def test_rows_that_the_template_refuses_are_d024(tmp_path: Path) -> None:
    mistral = Template.for_tokenizer(made_tokenizers.family_tokenizer(tmp_path / "base", "mistral"))
    rows = [chat(f"question {number}", f"answer {number}") for number in range(30)]
    rows.append({"messages": [*chat("a")["messages"], *chat("b", "c")["messages"]]})
    result = made.prepared(made.write(tmp_path / "rows.jsonl", rows), mistral)
    assert made.found(result, "D024").where.endswith(":31")


def test_earlier_answers_that_a_template_rewrites_are_d025(tmp_path: Path) -> None:
    qwen = Template.for_tokenizer(made_tokenizers.family_tokenizer(tmp_path / "base", "qwen3"))
    thought = "<think>\nhm\n</think>\n\nanswer"
    result = made.prepared(made.write(tmp_path / "rows.jsonl", [chat("a", thought, "c", thought)]), qwen, holdout=0.0)
    assert made.found(result, "D025").count == 1


class FaultyTemplate(Template):
    """A template that says one thing is wrong with the third row."""

    problem: str = ""

    def encode_many(self, records: Iterable[Record]) -> list[Encoded]:
        encoded = super().encode_many(records)
        if len(encoded) > 2 and not self.problem:
            encoded[2] = replace(encoded[2], mask=[False] * len(encoded[2].mask))
        elif len(encoded) > 2:
            encoded[2] = replace(encoded[2], problems=(self.problem,))
        return encoded


@pytest.mark.parametrize(("problem", "code"), [("", "D021"), *((problem, code) for problem, (code, _) in SAID.items())])
def test_what_is_wrong_with_a_tokenised_row_is_reported_with_its_place(
    tmp_path: Path, template: Template, problem: str, code: str
) -> None:
    faulty = FaultyTemplate(template.tokenizer, template.source)
    faulty.problem = problem
    path = made.write(tmp_path / "rows.jsonl", ROWS)
    result = made.prepared(path, faulty)
    finding = made.found(result, code)
    assert finding.where == f"{path}:3"
    kept = Severity.INFO if CODES[code].is_note else Severity.WARNING
    assert finding.severity is (Severity.ERROR if CODES[code].rejects else kept)
    assert result.summary.kept == (29 if CODES[code].rejects else 30)


# settings


def test_findings_can_be_selected_and_ignored(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0], made.row(60, input="a\x07b")])
    assert made.codes(made.prepared(path)) == {"D030", "D041"}
    assert made.codes(made.prepared(path, select=("D04",))) == {"D041"}
    assert made.codes(made.prepared(path, ignore=("D04",))) == {"D030"}


def test_selecting_findings_hides_no_error_and_lets_no_bad_row_pass(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, made.row(60, response=""), made.row(61, input="a\x07b")])
    result = made.prepared(path, select=("D03",))
    assert made.codes(result) == {"D013"}
    assert result.summary.rejected == 1


def test_tokens_that_the_base_never_learnt_are_d050(tmp_path: Path) -> None:
    base = made_tokenizers.family_folder(tmp_path / "base", "qwen2_5")
    template = Template.for_tokenizer(TextTokenizer.from_folder(base))
    weights = np.random.default_rng(0).normal(size=(template.tokenizer.vocab_size, 16)).astype(np.float32)
    weights[template.tokenizer.id_of("<|im_start|>")] = 0
    save_file({"model.embed_tokens.weight": weights}, base / "model.safetensors")
    path = made.write(tmp_path / "rows.jsonl", ROWS)
    finding = made.found(made.prepared(path, template, base=str(base)), "D050")
    assert finding.message == "special tokens that the base never learnt: <|im_start|>"
    assert finding.severity is Severity.WARNING
    trained = made.prepared(path, template, base=str(base), trainable_tokens="<|im_start|>")
    assert "D050" not in made.codes(trained)


def test_an_empty_response_can_be_allowed(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, made.row(60, response="")])
    assert made.prepared(path).summary.kept == 30
    assert made.prepared(path, ignore=("D013",)).summary.kept == 31
    by_prefix = made.prepared(path, ignore=("D01",))
    assert by_prefix.summary.kept == 30 and made.codes(by_prefix) == {"D013"}


def test_rejected_rows_of_an_attempt_before_do_not_stay_once_they_are_mended(tmp_path: Path) -> None:
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    refused = made.prepared(made.write(path, [*ROWS, made.row(60, response="")]), run_dir=run)
    assert refused.rejected == run / "rejected.jsonl" and refused.rejected.exists()
    mended = made.prepared(made.write(path, [*ROWS, made.row(60)]), run_dir=run)
    assert mended.rejected is None and not (run / "rejected.jsonl").exists()


def test_without_near_copies_wanted_none_are_looked_for(tmp_path: Path) -> None:
    near = [made.row(50, input=LONG), made.row(50, input=LONG.replace("term30", "other"))]
    path = made.write(tmp_path / "rows.jsonl", [*ROWS, *near])
    assert made.prepared(path, ignore=("D031", "D032")).summary.near_duplicates == 0


def test_a_field_that_appears_late_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": f"ask {n}", "response": f"say {n}"} for n in range(3000)]
    rows[2999]["input"] = "late"
    result = made.prepared(made.write(tmp_path / "rows.jsonl", rows), holdout=0.0)
    assert result.train.record(2999).turns[0].content == "ask 2999\nlate"


def test_several_files_and_their_places(tmp_path: Path) -> None:
    made.write(tmp_path / "a.jsonl", ROWS[:10])
    made.write(tmp_path / "b.jsonl", made.jsonl(ROWS[10:20]) + b"{broken\n")
    result = made.prepared(tmp_path / "*.jsonl")
    assert made.found(result, "D001").where == f"{tmp_path / 'b.jsonl'}:11:2"
    assert result.summary.files == (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))


def test_the_same_input_gives_the_same_rows(tmp_path: Path, template: Template) -> None:
    path = made.write(tmp_path / "rows.jsonl", ROWS)
    one = made.prepared(path, template)
    (tmp_path / "again").mkdir()
    other = made.prepared(made.write(tmp_path / "again" / "rows.jsonl", ROWS), template)
    assert one.train.content_hash == other.train.content_hash
    assert not other.summary.cached


def test_progress_is_told_with_rows_and_bytes(tmp_path: Path) -> None:
    from lorafit.config import resolve
    from lorafit.data import prepare

    told: list[Progress] = []
    path = made.write(tmp_path / "rows.jsonl", ROWS)
    prepare(resolve({}, {"data": str(path)}).config, None, cache_dir=tmp_path / "cache", on_progress=told.append)
    assert told[-1].rows == 30
    assert told[-1].bytes_done == told[-1].bytes_total == path.stat().st_size
    assert {one.stage for one in told} == {"reading", "looking for near copies"}


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.doc", b"hello", "is not a data file by its name"),
        ("rows.jsonl", b"", "the file is empty"),
        ("rows.jsonl", b'{"words": "a"}\n', "the rows' fields (words) are none of"),
        ("rows.json", b'{"data": [\n1]}', "holds one JSON object"),
    ],
)
def test_a_file_that_is_none_of_ours_is_one_sentence(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    with pytest.raises(DataError) as caught:
        made.prepared(made.write(tmp_path / name, content))
    assert caught.value.what.startswith(what)
    assert caught.value.where
    assert caught.value.fix


def test_a_run_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    path = made.write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(RunDirError, match="cannot be written"):
        made.prepared(path, run_dir=path)


GOOD_LINES = st.sampled_from([made.jsonl([row]) for row in ROWS[:4]])
LINES = st.lists(GOOD_LINES | st.sampled_from(list(BAD_LINES.values())) | st.binary(max_size=30), max_size=8)
FILES = LINES.map(b"\n".join) | LINES.map(lambda lines: b"[" + b",".join(lines) + b"]") | st.binary(max_size=80)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FILES, st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "json.zst", "parquet"]))
def test_no_bytes_raise_anything_but_our_own_errors_and_the_counts_add_up(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    try:
        result = made.prepared(made.write(tmp_path / f"rows.{suffix}", content))
    except LorafitError as error:
        assert "\n" not in error.sentence
        return
    summary = result.summary
    assert summary.read == summary.kept + summary.rejected + summary.dropped
    assert len(result.train) + len(result.holdout) == summary.kept
    for finding in result.findings:
        json.dumps(finding.to_dict()).encode()
        assert finding.message.isprintable()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(max_size=40), min_size=2, max_size=6),
    st.sampled_from(["error", "drop", "split-turns"]),
    st.sampled_from(["stop", "drop"]),
)
def test_the_counts_add_up_with_a_tokenizer_too(
    tmp_path: Path, template: Template, texts: list[str], on_long: str, on_bad: str
) -> None:
    path = made.write(tmp_path / "rows.jsonl", json.dumps(chat(*texts)).encode() + b"\n" + made.jsonl([chat("a", "b")]))
    result = made.prepared(path, template, max_length=48, on_long=on_long, on_bad=on_bad, holdout=0.0)
    summary = result.summary
    assert summary.read == 2 == summary.kept + summary.rejected + summary.dropped
    assert len(result.train) >= summary.kept
    assert summary.longest <= 48
    assert all(result.train.supervised > 0)
