"""StepLog: every step once, in order, one step late; and nothing within a step waits for the GPU."""

import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.methods.lora import attach
from lorafit.training import MetricsLog
from lorafit.training.logging.progress import StepLog, StepNumbers
from tiny_models import save_base

LENGTHS = (20, 9, 30, 14, 8, 11, 25, 17, 12, 21)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def trainer(base, folder, held_out=None, callbacks=(), **given):
    config = settings(base=base, **{"examples_per_step": 2, "max_length": 40, "max_steps": 7, "lr": 1e-2, **given})
    model = attach(load_backbone(config, device="cpu"), config)
    return training_loop(model, config, encoded_rows(*LENGTHS), held_out, folder, callbacks=callbacks)


def numbers(step):
    return StepNumbers(step, step / 4, 1e-3, 10, (step,))


def test_a_step_comes_out_once_the_next_is_pushed_and_the_last_at_the_flush():
    log = StepLog()
    out = []
    for step in range(1, 5):
        log.push(numbers(step), torch.tensor([float(step), 0.5]))
        arrived = log.ready()
        assert [one.step for one in arrived] == ([step - 1] if step > 1 else [])
        out += arrived
    out += log.flush()
    assert [(one.step, one.loss, one.grad_norm) for one in out] == [(step, float(step), 0.5) for step in range(1, 5)]
    assert log.flush() == log.ready() == []


def test_what_is_pushed_is_the_value_of_that_moment():
    log, measured = StepLog(), torch.tensor([1.0, 2.0])
    log.push(numbers(1), measured)
    measured.fill_(9.0)
    (one,) = log.flush()
    assert (one.loss, one.grad_norm) == (1.0, 2.0)


class Reads(TorchDispatchMode):
    """Counts the operations that hand a device's number to the host; integers say how rows lie, and are the host's."""

    READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.READING and args[0].dtype is not torch.int64:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


class BetweenSteps(TrainerCallback):
    """What was read between the end of one step's reporting and the end of the next."""

    def __init__(self, reads):
        self.reads, self.per_step, self.before = reads, [], None

    def on_step_begin(self, args, state, control, **_):
        self.before = sum(self.reads.seen.values())

    def on_step_end(self, args, state, control, **_):
        self.per_step.append(sum(self.reads.seen.values()) - self.before)


def test_nothing_within_a_step_reads_a_number_from_the_device(base, tmp_path):
    reads = Reads()
    spy = BetweenSteps(reads)
    run = trainer(base, tmp_path, callbacks=[spy], dropout=0.1)
    with reads:
        run.run()
        float(torch.ones(()) + 1)
    assert reads.seen["_local_scalar_dense"] >= 1, "the counter counts nothing"
    assert spy.per_step == [0] * 7


def test_logging_a_step_reads_nothing_through_the_device_either(base, tmp_path):
    """A whole run reads what each epoch's loader and transformers' summary read, however many steps there are."""
    run = trainer(base, tmp_path, max_steps=20, epochs=4, save_steps=20)
    run._save = lambda: None
    with Reads() as reads:
        run.run()
    epochs = 4
    assert sum(reads.seen.values()) <= epochs + 1


def test_every_step_is_logged_once_in_order_under_its_own_number(base, tmp_path):
    class Spy(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **_):
            kind = "loss" if "loss" in logs else "eval_loss" if "eval_loss" in logs else "end"
            self.seen.append((kind, state.global_step, round(state.epoch * 5, 6)))

    spy = Spy()
    run = trainer(base, tmp_path, encoded_rows(8, 9, seed=1), [spy], eval_steps=3, save_steps=2, max_steps=6)
    path = tmp_path / "metrics.jsonl"
    run.callbacks.handler.add_callback(MetricsLog(path))
    run.run()
    wanted = []
    for step in range(1, 7):
        wanted.append(("loss", step, step))
        if step in (3, 6):
            wanted.append(("eval_loss", step, step))
    assert spy.seen == [*wanted, ("end", 6, 6)]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == list(range(1, 7))


def test_the_logged_numbers_are_those_of_a_trainer_that_reads_at_once(base, tmp_path):
    """The reference reads every step's loss and learning rate when the step ends."""

    class AtOnce(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **_):
            self.step, self.rate = state.global_step + 1, lr_scheduler.get_last_lr()[0]

    spy, seen = AtOnce(), []
    run = trainer(base, tmp_path, callbacks=[spy])
    clip = run._clip

    def clipped(loss):
        measured = clip(loss)
        seen.append(measured.tolist())
        return measured

    run._clip = clipped
    rates = []
    advance = run._advance
    run._advance = lambda step: rates.append((spy.step, spy.rate)) or advance(step)
    run.run()
    wanted = [(step, loss, norm, rate) for (step, rate), (loss, norm) in zip(rates, seen, strict=True)]
    logged = [
        (entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"])
        for entry in run.state.log_history
        if "loss" in entry
    ]
    assert logged == wanted


def test_a_run_that_stops_early_still_logs_its_last_step(base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 4

    run = trainer(base, tmp_path, callbacks=[Stop()])
    run.run()
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_no_step_waits_for_it(tmp_path):
    """torch itself refuses every synchronising call between a step's beginning and its end."""

    class Forbid(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("error" if state.global_step >= 2 else "default")

        def on_step_end(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("default")

    config = settings(
        base=str(save_base(tmp_path / "base")), optimizer="adamw", max_steps=5, examples_per_step=2, max_length=40
    )
    model = attach(load_backbone(config), config)
    training_loop(model, config, encoded_rows(*LENGTHS), None, tmp_path / "run", callbacks=[Forbid()]).run()
