"""The command line as its users meet it: exit codes, sentences, JSON, and no traceback."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from little_run import write_rows
from lorafit.cli import main
from lorafit.cli.app import _as_lorafit_error, _commands
from lorafit.cli.export import show_exported
from lorafit.cli.flags import example_of, words_to_read
from lorafit.cli.merge import _next
from lorafit.cli.screen import console
from lorafit.cli.screen.findings_view import with_names
from lorafit.cli.serve import _show_started
from lorafit.data import Template
from lorafit.demo import BASE


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return ended.value.code or 0, out, err

    return call


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 60)


SETTING_FLAGS = "--method --lr --epochs --rank --max-length --batch --gpu-memory --vram --goal"
DATA_FLAGS = "--on-bad --on-long --long --map --encoding --holdout"
FLAGS = {
    "check": f"--base --show --fix --method --select --ignore {DATA_FLAGS} --set --json --help",
    "plan": f"--base --gpu --gpus {SETTING_FLAGS} --select --ignore {DATA_FLAGS} --out --set --explain --json --help",
    "train": f"--base --out --gpus {SETTING_FLAGS} {DATA_FLAGS} --set --restart --deterministic --json --help",
    "chat": "--prompt --system --compare --max-new-tokens --temperature --checkpoint --json --help",
    "eval": "--against --limit --max-new-tokens --map --least --out --checkpoint --json --help",
    "merge": "--onto --base --out --format --dtype --checkpoint --json --help",
    "export": "--to --quantization --onto --out --name --checkpoint --verify-in --json --help",
    "demo": "--task --method --seed --out --json --help",
    "settings": "--json --help",
    "explain": "--json --help",
}


@pytest.mark.parametrize("verb", FLAGS)
def test_the_flags_are_these_and_no_others(run, verb):
    """Adding a flag is a decision: make it here too."""
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", out)) == set(FLAGS[verb].split())


def test_the_verbs_are_listed_in_the_order_one_uses_them(run):
    _, out, _ = run("--help")
    places = [out.index(f" {verb} ") for verb in FLAGS]
    assert places == sorted(places)


def test_without_a_command_the_help_is_printed_and_nothing_else(run):
    assert run() == run("--help")


@pytest.mark.parametrize("verb", FLAGS)
def test_help_has_plain_types_and_none_for_switches(run, verb):
    _, out, _ = run(verb, "--help")
    assert not re.search(r"<(bool|int|float|str|list|Path)|range", out)
    assert ("NUMBER" in out) == (verb in ("check", "plan", "train", "chat", "eval", "demo"))


def test_every_flag_that_takes_a_value_has_an_example_of_one():
    for command in _commands():
        for option in command.params:
            if option.opts[0].startswith("--") and not option.is_flag:
                assert all(example_of(flag) not in ("", "None", "()") for flag in option.opts), option.opts


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom lorafit.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    best = 99.0
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - started)
    # 0.3 s on an idle machine; the bound leaves room for a neighbour test on the other core
    assert best < 1.0


def test_check_is_clean_with_exit_code_zero_and_json_for_machines(run, data):
    code, out, _ = run("check", data, "--base", BASE, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert report["summary"]["read"] == 60
    code, out, _ = run("check", data)
    assert code == 0
    assert "60 rows read = 60 kept" in out


def test_check_with_errors_has_exit_code_one_and_names_each_line(run, data):
    with data.open("a") as file:
        file.write('{"instruction": "a", "input": "b"}\n{broken\n')
    code, out, _ = run("check", data)
    assert code == 1
    printed = "".join(out.split())  # a long path wraps
    assert "rows.jsonl:61" in printed and "rows.jsonl:62" in printed


def test_on_a_narrow_screen_nothing_of_a_setting_is_left_out(run, data, monkeypatch):
    monkeypatch.setattr(console.PEOPLE, "width", 80)
    policy = "recompute_mlp_layers=1,recompute_layers=1,micro_tokens=12345"
    _, out, _ = run("plan", data, "--base", BASE, "--gpu", "H100", "--set", f"memory_policy={policy}", "--explain")
    assert "…" not in out.partition("matrix")[0]
    assert all(len(line) <= 80 for line in out.partition("\nnext")[0].splitlines())
    told = out.partition("\ndata")[2].partition("plan")[0].splitlines()
    assert told and all(line.startswith("  ") for line in told if line.strip())


def test_plan_says_to_machines_what_stops_it(run, data):
    with data.open("a") as file:
        file.write("{broken\n")
    code, out, _ = run("plan", data, "--base", BASE, "--json")
    planned = json.loads(out)
    errors = [finding["code"] for finding in planned["findings"] if finding["severity"] == "error"]
    assert (code, planned["ok"], errors) == (1, False, ["D001"])


@pytest.mark.parametrize(
    ("arguments", "code", "where"),
    [
        (["check", "nosuch.jsonl"], 1, "nosuch.jsonl"),
        (["plan", "{data}", "--base", "{base}", "--set", "rnk=3"], 2, "rnk"),
        (["train", "{data}", "--base", "/nope"], 1, "/nope"),
    ],
)
def test_with_json_an_error_is_an_object_too(run, data, arguments, code, where):
    filled = [argument.format(data=data, base=BASE) for argument in arguments]
    found, out, told = run(*filled, "--json")
    error = json.loads(out)
    assert (found, error["ok"], error["exit_code"]) == (code, False, code)
    assert where in json.dumps(error["error"]) and error["error"]["what"] and error["error"]["fix"]
    assert where in told, "the sentence stands on standard error as ever"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize(("name", "says"), [("nosuch.jsonl", "no such file"), ("rows.jsonl", "No space left")])
def test_an_object_that_finds_no_room_leaves_the_sentence_and_the_exit_code(data, name, says):
    command = [
        sys.executable,
        "-c",
        "from lorafit.cli import main; main()",
        "check",
        str(data.with_name(name)),
        "--json",
    ]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert says in ended.stderr and "Traceback" not in ended.stderr


def test_further_places_of_a_fault_are_named(run, data):
    with data.open("a") as file:
        file.write("{broken\n" * 7)
    _, out, _ = run("check", data)
    assert re.search(r"×7\S*rows\.jsonl:61:2", "".join(out.split()))  # a long path wraps
    assert re.search(r"also 62:2, 63:2, 64:2.*, …", out)


def test_show_prints_the_rows_text_with_its_stop_token(run, data):
    code, out, _ = run("check", data, "--base", BASE, "--show", 2)
    assert code == 0
    assert out.count("<|assistant|>") == 2
    assert out.count("</s>") >= 2


def test_plan_prints_reasons_memory_and_every_setting(run, data):
    code, out, _ = run("plan", data, "--base", BASE, "--gpu", "T4", "--explain")
    assert code == 0
    for word in ("QLoRA", "rank", "memory", "settings", "fp16", "weight_decay"):
        assert word in out
    code, out, _ = run("plan", data, "--base", BASE, "--json", "--set", "rank=64")
    planned = json.loads(out)
    assert planned["settings"]["rank"] == {"value": 64, "source": "flag"}
    assert "P7" in [finding["code"] for finding in planned["plan"]["findings"]]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "{data}", "--base", "./nowhere"], 1, "the base is not a folder"),
        (["train", "{data}"], 2, "no base model is named"),
        (["train", "{data}", "--base", "{base}", "--set", "warmup_steps=9"], 2, "write warmup: the share"),
        (["train", "{data}", "--warmup", "0.1"], 2, "has no flag --warmup; write --set warmup=0.1"),
        (["train", "{data}", "--learning-rate", "1e-4"], 2, "has no flag --learning-rate; write --lr"),
        (["merge", "{folder}", "--onot", "original"], 2, "did you mean --onto?"),
        (["plan", "{data}", "--base", "{base}", "--gpu", "M2 Max"], 2, "is not an NVIDIA GPU"),
        (["check", "{data}", "--select", "D99"], 2, "no finding's code starts with"),
        (["settings", "rnk"], 2, "did you mean 'rank'"),
        (["explain", "D999"], 2, "no finding has the code 'D999'"),
        (["explain", "d34"], 2, "no finding has the code 'd34'; did you mean D034?"),
        (["plan", "{data}", "--gpu"], 2, '--gpu needs a value, as in --gpu "RTX 4090"'),
        (["plan", "{data}", "--max-length"], 2, "--max-length needs a value, as in --max-length 2048"),
        (["plan", "{data}", "--json=1"], 2, "--json takes no value"),
        (["chekc", "{data}"], 2, "error: no such command 'chekc'; did you mean 'lorafit check'?"),
        (["train"], 2, "no data are named"),
        (["train", "{data}", "--base", "{base}", "--set", "epoch=1"], 2, "did you mean 'epochs'"),
        (["train", "{data}", "--base", "{base}", "--set", "rank"], 2, "key=value"),
        (["train", "{data}", "--base", "{base}", "--set", "restart=true"], 2, "unknown setting 'restart'"),
        (["check", "{data}", "--set", "on_progress=1"], 2, "unknown setting 'on_progress'"),
        (["train", "{data}", "--base", "{base}", "--set", "base=other"], 2, "--set says 'other'"),
        (["train", "{data}", "--base", "{base}", "--out", "a", "--set", "out=b"], 2, "--set says 'b'"),
        (["plan", "{data}", "--base", "{base}", "--set", "data=other.jsonl"], 2, "name them once"),
        (
            ["plan", "{data}", "--base", "{base}", "--gpu-memory", "8GiB", "--set", "gpu_memory=4GiB"],
            2,
            "--set says '4GiB'",
        ),
        (["train", "{data}", "--base", "{base}", "--deterministic", "--set", "deterministic=off"], 2, "name it once"),
        (["check", "{data}", "--set", "seed=1", "--set", "seed=2"], 2, "'seed' is set to 1 and to 2"),
        (["train", "{data}", "--base", "{base}", "--holdout", "2026-02-31"], 1, "2026-02-31: no such file"),
        (["plan", "{data}", "--base", "{base}", "--gpu-memory", "8"], 2, "write it like 8GiB"),
        (["train", "{data}", "--base", "{base}", "--on-bad", "maybe"], 2, "on_bad"),
        (["train", "nowhere.jsonl", "--base", "{base}"], 1, "nowhere.jsonl"),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["plan", "{data}", "--base", "{base}", "--gpu", "RTX 4091"], 2, "RTX 4090"),
        (["plan", "{data}", "--base", "{base}", "--gpu-memory", "lots"], 2, "not a size"),
        (["chat", "{folder}"], 1, "holds no run"),
        (["chat", "{folder}/nosuch"], 1, "nosuch: no such folder"),
        (["merge", "{folder}"], 1, "holds no run"),
        (["merge", "{folder}", "--format", "ggfu"], 2, "--format: 'ggfu' is not an export format; choose safetensors"),
        (["export", "{folder}", "--to", "gguf", "--quantization", "q9"], 2, "--quantization: 'q9' is no precision"),
        (["export", "{folder}", "--to", "ggfu"], 2, "'--to': 'ggfu' is not one of"),
        (["plan", "{data}", "--base", "{base}", "--method", "dora"], 2, "--method: 'dora' is not one of its values"),
        (["plan", "{data}", "--base", "{base}", "--set", "method=dora"], 2, "error: method: 'dora' is not one of"),
        (["plan", "{data}", "--base", "{base}", "--gpu", "M2 Max"], 2, "or plan for the CPU with --gpu cpu"),
        (["demo", "--task", "poems"], 2, "no demo task 'poems'"),
        (["check", "{data}", "--show", "1"], 2, "add --base"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr(run, data, tmp_path, arguments, code, words):
    folder = tmp_path / "empty"
    folder.mkdir()
    given = [text.format(data=data, base=BASE, folder=folder) for text in arguments]
    got, out, err = run(*given)
    assert got == code
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == "" or "check" in out  # a plan that cannot be made still shows what was read


def test_the_commands_that_check_proposes_read_the_file_as_the_user_does(run, tmp_path):
    file = tmp_path / "tickets.csv"
    rows = "".join(f"Où est la commande {number} ?;Commande {number} : expédiée à Lyon.\r\n" for number in range(30))
    file.write_bytes(f"question;answer\r\n{rows}".encode("cp1252"))
    code, out, _ = run("check", file, "--map", "instruction=question", "--map", "response=answer")
    reading = "--encoding cp1252 --map instruction=question --map response=answer"
    assert code == 1
    assert f"lorafit check {file} {reading}" in out
    code, out, _ = run("check", file, *reading.split())
    assert code == 0
    assert f"lorafit check {file} {reading} --fix clean.jsonl" in " ".join(out.split())


def test_data_base_and_out_are_settings_as_any_other(run, data, tmp_path):
    recipe, other = tmp_path / "recipe.yaml", write_rows(tmp_path / "other.jsonl", 30)
    recipe.write_text(f"base: {BASE}\ndata: {other}\n")
    code, out, _ = run("check", recipe, "--set", f"data={data}", "--json")
    assert (code, json.loads(out)["summary"]["read"]) == (0, 60)
    code, out, _ = run("check", data, "--set", f"base={BASE}", "--show", 1)
    assert (code, out.count("<|assistant|>")) == (0, 1)
    code, out, _ = run("plan", recipe, "--set", f"data={data}", "--set", f"base={BASE}", "--json")
    assert (code, json.loads(out)["data"]["read"]) == (0, 60)
    folder = tmp_path / "2026-13-45"
    given = ("--set", f"data={data}", "--set", f"out={folder}", "--set", f"base={BASE}", "--set", "max_steps=1")
    code, out, _ = run("train", recipe, *given, "--json")
    assert (code, json.loads(out)["run"]) == (0, str(folder))
    assert json.loads(out)["train_rows"] > 30
    code, _, err = run("train", folder)
    assert (code, f"its recipe is {folder / 'run.yaml'}" in err) == (2, True)


def test_an_unknown_flag_or_verb_is_usage(run):
    assert run("train", "--rnk", "3")[0] == 2
    assert run("trian")[0] == 2


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "lorafit", "check", "nosuch.jsonl", "--debug"]  # imports no torch
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "lorafit.errors.DataError: nosuch.jsonl: no such file" in ended.stderr


@pytest.mark.slow
def test_train_merge_and_chat_as_one_types_them(run, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    given = ("--base", BASE, "--out", folder, "--set", "max_steps=3", "--set", "lr=5e-3")
    code, out, _ = run("train", data, *given)
    assert code == 0
    assert "trainable of" in out
    assert "32,768" in out
    assert f"lorafit chat {folder}" in out.replace("\n", "")
    assert "Loading weights" not in out
    code, _, err = run("train", data, *given)
    assert (code, err.startswith("finished: ")) == (0, True)
    code, out, err = run("train", data, *given, "--json")
    assert (code, json.loads(out)["finished"]) == (0, True)
    assert all(json.loads(line)["event"] for line in err.splitlines())
    code, out, _ = run("merge", folder, "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True
    merged = folder / "exports" / "merged"
    code, out, _ = run("chat", merged, "--prompt", "Hello", "--json", "--max-new-tokens", 5)
    assert (code, set(json.loads(out))) == (0, {"prompt", "tuned"})
    code, _, err = run("chat", merged, "--prompt", "Hello", "--compare")
    assert (code, "has no base to compare with" in err) == (2, True)
    code, out, _ = run("chat", folder, "--prompt", "Hello", "--compare", "--json", "--max-new-tokens", 5)
    assert code == 0
    assert set(json.loads(out)) == {"prompt", "tuned", "base"}
    asked = []
    render = Template.prompt_ids
    monkeypatch.setattr(Template, "prompt_ids", lambda self, messages: asked.append(messages) or render(self, messages))
    assert run("chat", folder, "--prompt", "Hello", "--system", "Be brief.", "--max-new-tokens", 1)[0] == 0
    assert asked[-1] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    monkeypatch.undo()
    code, out, _ = run("chat", folder, "--prompt", "Hello", "--compare", "--max-new-tokens", 5)
    assert "base" in out
    assert "tuned" in out


@pytest.mark.slow
def test_the_console_shows_our_lines_and_the_log_theirs(data, tmp_path):
    """In a fresh process, where libraries say what they say at import."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "lorafit", "train", str(data), "--base", str(BASE), "--out", str(folder)]
    ended = subprocess.run(
        [*command, "--set", "max_steps=1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    for noise in ("Loading weights", "bitsandbytes", "FutureWarning", "torch_dtype"):
        assert noise not in ended.stdout
    assert (folder / "log.txt").is_file()


def test_check_with_a_base_runs_the_pitfalls_too(run, data):
    _, out, _ = run("check", data, "--base", BASE, "--json", "--set", "dropout=0.3", "--set", "rank=64")
    codes = {finding["code"] for finding in json.loads(out)["findings"]}
    assert {"P4", "P7"} <= codes


def test_a_full_disk_is_one_sentence(run, data, monkeypatch):

    from lorafit.api import check as room

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/disk")

    monkeypatch.setattr(room, "prepare", full)
    code, _, err = run("check", data)
    assert (code, err.count("\n")) == (1, 1)
    assert "/full/disk: No space left on device" in err


def test_a_fault_of_ours_asks_for_a_report_without_a_trace(run, data, monkeypatch):
    from lorafit.api import check as room

    monkeypatch.setattr(room, "prepare", lambda *_, **__: 1 / 0)
    code, _, err = run("check", data)
    assert code == 70
    assert "internal error (ZeroDivisionError: division by zero)" in err


def test_memory_that_does_not_suffice_to_tell_an_error_ends_in_one_sentence():
    program = (
        "import lorafit.cli.app as app\n"
        "def full(*_): raise MemoryError\n"
        "app._as_lorafit_error = full\n"
        "app.main(['chat', 'nowhere'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: the memory that this process may use is full; free some, or raise its limit\n"


@pytest.mark.parametrize("command", [("merge", "x"), ("eval", "x"), ("serve", "x"), ("export", "x", "--to", "gguf")])
def test_too_little_address_space_for_torch_is_one_sentence(run, monkeypatch, command):
    """Below a GiB torch's libraries end the process with SIGABRT while they are imported."""
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (500 << 20, 500 << 20))
    code, _, err = run(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert "memory that this process may use is full; free some, or raise the limit" in err


def test_a_line_end_in_a_path_does_not_break_the_sentence(run):
    code, _, err = run("check", "no\n\x1b[31mfile.jsonl")
    assert (code, err.count("\n")) == (1, 1)
    assert "no\\n\\x1b[31mfile.jsonl" in err


@pytest.mark.parametrize("problem", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_full_memory_is_one_sentence_with_a_fix(run, data, monkeypatch, problem):
    from lorafit.api import check as room

    def full(*_, **__):
        raise problem

    monkeypatch.setattr(room, "prepare", full)
    code, _, err = run("check", data)
    assert (code, err.count("\n")) == (1, 1)
    assert "memory that this process may use is full; free some, or raise the limit" in err


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_a_run_that_a_signal_stopped_ends_with_its_code_and_the_command_that_goes_on(
    run, data, monkeypatch, number, code
):
    from lorafit.api import train as room
    from lorafit.errors import TrainingStopped

    def stopped(*_, **__):
        raise TrainingStopped(number, "stopped after step 3 of 9", fix="resume with: lorafit train r/run.yaml --out r")

    monkeypatch.setattr(room, "train", stopped)
    got, _, err = run("train", data, "--base", BASE)
    assert got == code
    assert err == "stopped: stopped after step 3 of 9; resume with: lorafit train r/run.yaml --out r\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_libraries_are_imported_is_one_sentence_and_its_exit_code(run, data, monkeypatch, number):
    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGUSR1)  # a spot instance's notice: no end of the run
        os.kill(os.getpid(), number)

    monkeypatch.setattr("lorafit.api.settings.require_startable", stopped)
    code, _, err = run("train", data, "--base", BASE)
    assert code == 128 + number
    assert err == f"stopped: {number.name} stopped the run before training, nothing was lost\n"


def test_ctrl_c_is_one_sentence_and_exit_code_130(run, data, monkeypatch):
    def interrupted(*given, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorafit.api.check.check", interrupted)
    code, _, err = run("check", data)
    assert code == 130
    assert err.startswith("stopped: ")
    assert err.count("\n") == 1


def test_the_plan_says_first_whether_the_run_fits_and_last_what_to_type(run, data, monkeypatch):
    monkeypatch.setattr(console.PEOPLE, "width", 80)
    code, out, _ = run("plan", data, "--base", BASE, "--gpu", "4090", "--rank", "8")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("fits") and "QLoRA on RTX 4090" in lines[0] and "GiB" in lines[0]
    assert len(lines) <= 16
    assert f"next      lorafit train {data} --base" in out and "--rank 8" in out
    code, out, _ = run("plan", data, "--base", BASE, "--gpu", "4090", "--gpu-memory", "1MiB")
    assert (code, out.splitlines()[0].startswith("does not fit")) == (1, True)
    assert "or --gpu-memory " in out.splitlines()[1]
    assert "lorafit train" not in out


def test_gigabytes_are_as_the_box_says(run, data):
    code, out, _ = run("plan", data, "--base", BASE, "--gpu", "4090", "--vram", "8GB")
    assert code == 0
    assert "of 8.0 GiB" in out and "gpu_memory 8GB is read as 8.0 GiB" in out


def test_an_unknown_command_is_an_object_for_machines_too(run):
    code, out, _ = run("chekc", "--json")
    assert (code, json.loads(out)["ok"]) == (2, False)


def test_settings_by_any_name_and_findings_by_code_are_explained(run):
    code, out, _ = run("settings", "learning_rate")
    assert code == 0
    assert "lr" in out and "0.0002" in out and "--set lr=1e-4" in out
    assert "examples_per_step" in run("settings")[1]
    code, out, _ = run("explain", "d013")
    assert code == 0
    assert "an empty response" in out and "silence" in out
    assert json.loads(run("explain", "--json")[1])[0]["code"] == "D001"


@pytest.mark.parametrize("words", [("-h",), ("help",), ("help", "plan"), ("plan", "-h")])
def test_help_is_where_people_look_for_it(run, words):
    code, out, _ = run(*words)
    assert code == 0
    assert ("--explain" in out) == ("plan" in words)


@pytest.mark.parametrize("verb", FLAGS)
def test_every_help_has_an_example(run, verb):
    assert f"lorafit {verb}" in run(verb, "--help")[1].partition("Examples")[2]


def test_plain_output_marks_what_is_supervised_and_no_line_ends_in_blanks(run, data):
    _, out, _ = run("check", data, "--base", BASE, "--show", 1)
    assert re.search(r"⟦.+</s>⟧", out, re.DOTALL)
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_check_ends_with_the_command_that_comes_next(run, data, monkeypatch):
    monkeypatch.chdir(data.parent)
    _, out, _ = run("check", data.name, "--base", BASE)
    assert f"next      lorafit plan {data.name} --base" in out
    with data.open("a") as file:
        file.write("{broken\n")
    _, out, _ = run("check", data)
    assert f"next      lorafit check {data.name} --fix clean.jsonl" in out and "--on-bad drop" in out
    assert str(data) not in out, "paths below the current folder are relative"


def test_dropping_is_not_advised_where_nothing_would_be_left(run, tmp_path):
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"messages": [image, {"role": "assistant", "content": "a"}]}) + "\n") * 2)
    for verb in ("check", "plan"):
        code, out, err = run(verb, data, "--base", BASE)
        assert code == 1 and "row" in out + err and "--on-bad drop" not in out + err


def test_merge_advises_chat_only_for_what_chat_opens(tmp_path):
    def advised(kind, passed=True, onto="quantized"):
        report, verification = SimpleNamespace(onto=onto), SimpleNamespace(export_format=kind)
        merged = SimpleNamespace(folder=tmp_path, passed=passed, report=report, verification=verification)
        return _next(merged, "runs/a b")

    assert advised("foreign") == []
    assert [command.split()[:2] for command, _ in advised("safetensors")] == [["lorafit", "chat"]]
    assert advised("safetensors", passed=False)[0][0] == "lorafit chat 'runs/a b'"
    assert advised("safetensors", passed=False, onto="original")[0][0] == "lorafit merge 'runs/a b' --onto quantized"
    (tmp_path / "model.gguf").touch()
    assert advised("gguf-q8_0")[0][0].startswith("llama-server")


def test_the_fix_of_a_finding_reads_the_data_as_the_command_did(run, data, monkeypatch):
    monkeypatch.chdir(data.parent)
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b'"response"', b'"Agent Reply"'))
    _, out, _ = run("check", data.name, "--map", "response=Agent Reply")
    fix = f"lorafit check {data.name} --map 'response=Agent Reply' --fix clean.jsonl writes it clean"
    assert fix in " ".join(out.split())
    reading = {"encoding": None, "field_map": ["response=Agent Reply"]}
    assert with_names("lorafit check --fix writes it clean", words_to_read([data.name], reading, None)) == fix


def test_the_command_after_an_export_and_a_server_can_be_pasted(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    serving = {"commands": [{"engine": "vLLM", "command": "sh vllm.sh"}]}
    verification = {"engines": []}
    show_exported(SimpleNamespace(folder=tmp_path / "my run", serving=serving, verification=verification, findings=()))
    assert "next      (cd 'my run' && sh vllm.sh)  serve it with vLLM" in capsys.readouterr().out
    _show_started("http://127.0.0.1:8000", ["base", "it's"], "KEY", None, as_json=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    asked = shlex.split(line.removeprefix("next"))
    assert asked[:4] == ["curl", "http://127.0.0.1:8000/v1/chat/completions", "-H", "Authorization: Bearer KEY"]
    assert json.loads(asked[5])["model"] == "it's"


def test_on_a_narrow_screen_the_reasons_of_a_plan_go_on_in_the_next_line(run, data, monkeypatch):
    monkeypatch.setattr(console.PEOPLE, "width", 60)
    _, out, _ = run("plan", data, "--base", BASE, "--gpu", "4090")
    words = " ".join(out.partition("\nnext")[0].split())
    assert "a larger adapter would memorize them" in words and "…" not in words
    assert "few rows limit accuracy more than a 4-bit base does" in words


def test_the_bases_that_merge_offers_are_those_that_it_takes():
    from typing import get_args, get_type_hints

    from lorafit.cli.merge import merge as command
    from lorafit.config import MergeBase

    offered = get_args(get_args(get_type_hints(command)["onto"])[0])
    assert {*offered, "whole"} == set(get_args(MergeBase)), "a run that trained every weight has no base to choose"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_memory_that_ended_is_one_sentence_and_no_bug(error):
    told = _as_lorafit_error(error, ["train"])
    assert (told.exit_code, told.what) == (1, "the memory that this process may use is full")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to open file </x/model.safetensors> in read-only mode: Input/output error (5)"),
        Exception("Input/output error (os error 5)"),
    ],
    ids=["torch", "tokenizers"],
)
def test_a_file_that_a_library_cannot_open_is_one_sentence_and_no_bug(error):
    told = _as_lorafit_error(error, ["chat"])
    assert (told.exit_code, told.fix) == (1, "check the disk and the path")
