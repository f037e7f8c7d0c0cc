"""JSON and YAML from strangers: limits on size and depth, no aliases, and always one sentence that names the place."""

import pytest
import yaml

from lorafit.config import load_recipe, parse_assignments
from lorafit.config.foreign_text import MAX_DEPTH, MAX_JSON_BYTES, MAX_YAML_BYTES, parse_yaml, read_json
from lorafit.errors import AdapterError, UsageError


def nested(levels, opening="[", closing="]"):
    return opening * levels + closing * levels


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "file"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1, 2]", "is not a JSON object"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ('{"a": ' + nested(MAX_DEPTH) + "}", "nests deeper"),
        ('{"a": ' + nested(100_000) + "}", "nests deeper"),
        ('{"a": ' + '{"a": ' * 40 + "1" + "}" * 41, "nests deeper"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
        (" " * (MAX_JSON_BYTES + 1), "larger than"),
    ],
)
def test_json_that_is_none_or_too_much_is_one_sentence(file, text, words):
    with pytest.raises(AdapterError, match=words) as caught:
        read_json(file(text), AdapterError, fix="mend it")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; mend it")


def test_plain_json_is_read(file):
    assert read_json(file('{"a": [1, {"b": null}]}'), AdapterError) == {"a": [1, {"b": None}]}
    deepest = '{"a": ' + nested(MAX_DEPTH - 1) + "}"
    assert "a" in read_json(file(deepest), AdapterError)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere\.json: the file cannot be read"):
        read_json(tmp_path / "nowhere.json", AdapterError)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank: 8\nlr: 1\nrank: 16\n", r"recipe.yaml:3:1: .*duplicate key 'rank'"),
        ("data: " + nested(50_000), r"recipe.yaml:1:\d+: .*nests too deeply"),
        ("- " * 5_000 + "x", "nests too deeply"),
        ("!!python/object/apply:os.system ['true']", r"recipe.yaml:1:1: .*could not determine a constructor"),
        ("seed: !!int abc", r"recipe.yaml:1:7: .*not a number"),
        ("seed: " + "9" * 10_000, r"recipe.yaml:1:7: .*not a number"),
        ("lr: " + "9" * 400, r"recipe.yaml:1:5: .*not a number"),
        ("a: [1, 2\n", "recipe.yaml:2"),
        (b"\xff\xfe\xff", "not UTF-8"),
        ("# " + "x" * MAX_YAML_BYTES, "larger than"),
        ("just words", "mapping of settings"),
    ],
)
def test_a_recipe_that_is_no_plain_yaml_is_one_sentence_with_its_line(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_yaml_without_tricks_reads_as_safe_load_does():
    text = "base: x\ndata: [a, b]\nmap: {response: answer}\nlr: 2.0e-4\nsave_steps: null\nquoted: 'a: b'\nseed: 7\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_an_assignment_that_nests_too_deeply_is_one_sentence():
    with pytest.raises(UsageError, match="is not a value"):
        parse_assignments(["data=" + nested(5_000)])


@pytest.mark.parametrize("text", ["1:30", "59:59" + ":1" * 50_000, "1:30.5", "2026-01-01", "2026-13-45"])
def test_times_and_dates_are_text_at_once(text):
    assert parse_yaml(f"seed: {text}") == {"seed": text}


def test_remote_code_is_refused_by_name():
    from lorafit.config import resolve

    with pytest.raises(UsageError, match="never runs Python code"):
        resolve(flags={"trust_remote_code": True})


def test_a_disk_too_full_for_a_download_is_said_to_be_so(monkeypatch):
    import errno

    import huggingface_hub

    from lorafit.config import base_folder
    from lorafit.errors import BackboneError

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(BackboneError, match="the disk is full, so 'some/base' cannot be downloaded"):
        base_folder("some/base")
