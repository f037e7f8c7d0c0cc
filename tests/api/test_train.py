"""train: from rows to a run directory that describes itself, or one sentence and nothing left behind."""

import json
import math
import os
import signal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from little_run import write_rows
from lorafit.api.observer import Observer
from lorafit.api.train import train
from lorafit.demo import BASE
from lorafit.errors import (
    BackboneError,
    DataError,
    LorafitError,
    PlanError,
    RunDirError,
    TrainingError,
    TrainingStopped,
    UsageError,
)
from lorafit.runs import RunDir


def test_the_run_directory_describes_itself(tiny_run):
    run = tiny_run.run
    for name in (
        "run.yaml",
        "plan.json",
        "findings.json",
        "metrics.jsonl",
        "template.json",
        "held-out.jsonl",
        "base.json",
        "log.txt",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints/step-000008/manifest.json",
    ):
        assert (run.path / name).is_file(), name
    assert RunDir.open(run.path).config() == tiny_run.resolved.config.model_copy(update={"out": None})


def test_the_metrics_have_each_step_once_and_the_loss_falls(tiny_run):
    lines = [json.loads(line) for line in tiny_run.run.metrics.read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 9))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] * 0.8
    assert all(math.isfinite(line["grad_norm"]) for line in lines if "loss" in line)
    assert any("eval_loss" in line for line in lines)


def test_what_nobody_set_is_planned_and_what_was_set_stays(tiny_run):
    config, sources = tiny_run.resolved.config, tiny_run.resolved.sources
    assert (config.rank, config.alpha, sources["rank"]) == (8, 16, "plan")  # 48 rows: rank 8 is enough
    assert (config.lr, sources["lr"]) == (5e-3, "flag")


def test_only_adapters_train_and_the_count_is_true(tiny_run):
    trainable = {name: w for name, w in tiny_run.model.named_parameters() if w.requires_grad}
    assert all(".lora_" in name and weight.dtype == torch.float32 for name, weight in trainable.items())
    assert tiny_run.counts.trainable == sum(weight.numel() for weight in trainable.values()) == 32_768
    assert tiny_run.counts.total == 3_475_712 + 32_768


def test_plain_peft_loads_the_adapter(tiny_run):
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tiny_run.run.adapter)
    ids = torch.arange(5, 25)[None]
    with loaded.disable_adapter():
        before = loaded(ids).logits
    assert not torch.equal(loaded(ids).logits, before)


def test_nothing_is_padded_and_the_stop_token_is_taught(tiny_run):
    rows = tiny_run.train_rows
    (stop,) = tiny_run.template.stop_ids
    for index in range(len(rows)):
        ids, mask = rows.ids(index), rows.mask(index)
        assert ids[-1] == stop
        assert mask[-1]
        assert not mask[0]
        text = tiny_run.template.tokenizer.decode(ids[mask][:-1].tolist())
        assert text == rows.record(index).response


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (BackboneError, "the base is not a folder", {"base": "./nowhere"}),
        (UsageError, "no base model is named", {"base": None}),
        (UsageError, "unknown setting 'rnk'", {"rnk": 3}),
        (LorafitError, "nope", {"targets": "nope_proj"}),
        (PlanError, "gpu_memory allows 1.0 MiB", {"gpu_memory": "1MiB"}),
    ],
)
def test_a_run_that_cannot_start_says_why_and_leaves_nothing(tmp_path, error, words, given):
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(error) as caught:
        train(data, **{"base": str(BASE), "out": tmp_path / "run", **given})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("not json at all\n", "rows.jsonl:1"),
        ('{"instruction": "a", "response": "fine"}\n{"instruction": "a", "input": "b"}\n', "rows.jsonl:2"),
        ('{"instruction": "a", "input": "b"}\n', "rows.jsonl: .*--map response="),
        ('{"instruction": "a", "response": "fine"}\n{"instruction": "a", "response": null}\n', "rows.jsonl:2"),
    ],
)
def test_data_that_cannot_be_trained_on_is_named_by_its_line(tmp_path, content, words):
    data = tmp_path / "rows.jsonl"
    data.write_text(content)
    with pytest.raises(DataError, match=words):
        train(data, str(BASE), out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_a_missing_data_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        train(tmp_path / "nowhere.jsonl", str(BASE), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_is_never_overwritten(tiny_run):
    before = (tiny_run.run.adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunDirError, match="the finished run in this folder was started with"):
        train(tiny_run.train_rows.store.names[0], str(BASE), out=tiny_run.run.path)
    assert (tiny_run.run.adapter / "adapter_model.safetensors").read_bytes() == before


def test_a_base_without_a_tokenizer_is_one_sentence(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((BASE / name).read_bytes())
    with pytest.raises(LorafitError, match="tokenizer") as caught:
        train(write_rows(tmp_path / "rows.jsonl"), str(base), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_a_recipe_and_runs_again_to_the_same_bits(tiny_run, tmp_path):
    again = train(tiny_run.run.settings, out=tmp_path / "again")
    first, second = (path / "adapter_model.safetensors" for path in (tiny_run.run.adapter, again.run.adapter))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"report_to": "no_such_tracker"}, "no_such_tracker"), ({"gpu": "H100"}, "this machine's own GPU")],
)
def test_what_train_cannot_honour_is_refused_before_anything_is_written(tmp_path, given, words):
    with pytest.raises(UsageError, match=words):
        train(write_rows(tmp_path / "rows.jsonl"), str(BASE), out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_several_gpus_need_a_launcher(tmp_path):
    with pytest.raises(UsageError, match="cannot use several GPUs; use 'lorafit train --gpus'"):
        train(write_rows(tmp_path / "rows.jsonl"), str(BASE), out=tmp_path / "run", gpus=2)
    assert not (tmp_path / "run").exists()


def test_numbers_gone_bad_stop_the_run_and_are_never_saved(tmp_path):
    with pytest.raises(TrainingError, match=r"3 steps in a row were not finite .*NaN"):
        train(write_rows(tmp_path / "rows.jsonl"), str(BASE), out=tmp_path / "run", lr=1e30, warmup=0, save_steps=1)
    assert not (tmp_path / "run" / "adapter").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_the_live_model_of_a_run_generates_through_transformers(tiny_run):
    made = tiny_run.model.generate(input_ids=torch.tensor([[0, 40, 50]]), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 3


class LittleMemory(TrainerCallback):
    """The last layer's forward runs out of memory above `tokens` tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def on_train_begin(self, args, state, control, model=None, **_):
        def run(module, inputs, output):
            if module.training and inputs[0].shape[1] > self.tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")

        model.get_base_model().model.layers[-1].register_forward_hook(run)


def test_memory_that_runs_out_beside_the_steps_names_what_saves_it(tmp_path):
    class AfterTheStep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(
        TrainingError, match=r"ran out in step 1; set gpu_memory below the GPU's free memory.*memory_policy=recompute"
    ):
        train(data, str(BASE), out=tmp_path / "run", max_steps=1, callbacks=[AfterTheStep()])


def test_a_run_whose_memory_ran_out_ends_well_and_says_what_to_set_next_time(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    trained = train(data, str(BASE), out=tmp_path / "run", max_steps=3, callbacks=[LittleMemory(300)])
    assert trained.steps == 3
    (finding,) = [finding for finding in trained.findings if finding.code == "R001"]
    assert "micro_tokens=" in finding.fix
    saved = json.loads((tmp_path / "run" / "findings.json").read_text())
    assert saved[-1]["code"] == "R001"
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {event["kind"] for event in events} == {"out_of_memory"}
    setting = finding.fix.rpartition("memory_policy: ")[2]
    again = train(
        data, str(BASE), out=tmp_path / "again", max_steps=3, memory_policy=setting, callbacks=[LittleMemory(300)]
    )
    assert "R001" not in [finding.code for finding in again.findings]


class Signalled(Observer):
    """Sends this process `numbers` when the base is about to be loaded."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def on_loading(self, run):
        for number in self.numbers:
            os.kill(os.getpid(), number)


def test_sigterm_before_training_leaves_nothing_or_the_old_run_in_its_place(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    given = {"base": str(BASE), "out": tmp_path / "run", "max_steps": 1}
    with pytest.raises(TrainingStopped, match="SIGTERM stopped the run before training") as stopped:
        train(data, **given, observer=Signalled(signal.SIGTERM))
    assert stopped.value.exit_code == 143
    assert not (tmp_path / "run").exists()
    train(data, **given, observer=Signalled(signal.SIGUSR1))  # survived
    before = (tmp_path / "run" / "fingerprint.json").read_bytes()
    with pytest.raises(TrainingStopped):
        train(data, **given, restart=True, observer=Signalled(signal.SIGTERM))
    assert (tmp_path / "run" / "fingerprint.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run"]
