"""Numbers that go bad: never applied, always written down with their rows, and an end to a run that has only them."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.errors import AdapterError, TrainingError
from lorafit.methods.lora import attach
from lorafit.training import EventLog, MetricsLog
from lorafit.training.guards.loss_monitor import MIN_SEEN, WINDOW, LossMonitor, SpikeRule
from lorafit.training.logging.progress import StepNumbers
from tiny_models import save_base

ROWS = encoded_rows(20, 9, 30, 14, 8, 11, 25, 17, 12, 21)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


class Inject(TrainerCallback):
    """Multiplies the hidden states before the head by `factor` in the given steps."""

    def __init__(self, factor, *steps):
        self.factor, self.steps, self.now = factor, steps, False

    def on_train_begin(self, args, state, control, model=None, **_):
        if not hasattr(self, "hook"):
            self.hook = model.get_base_model().model.norm.register_forward_hook(self.run)

    def on_step_begin(self, args, state, control, **_):
        self.now = state.global_step + 1 in self.steps

    def on_step_end(self, args, state, control, **_):
        self.now = False

    def run(self, module, inputs, output):
        return output * self.factor if self.now else output


class LeaveOut(TrainerCallback):
    def __init__(self, *steps):
        self.steps, self.trainer = steps, None

    def on_train_begin(self, args, state, control, **_):
        self.trainer.left_out |= set(self.steps)


def run(base, folder, *callbacks, **given):
    options = {"examples_per_step": 2, "max_length": 40, "max_steps": 7, "epochs": 99, "lr": 1e-2, "save_steps": 2}
    config = settings(base=base, **{**options, **given})
    model = attach(load_backbone(config, device="cpu"), config)
    events = EventLog(folder / "events.jsonl")
    trainer = training_loop(
        model, config, ROWS, None, folder / "checkpoints", callbacks=list(callbacks), events=events, run="r"
    )
    trainer.callbacks.handler.add_callback(MetricsLog(folder / "metrics.jsonl"))
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def weights(trainer):
    return torch.cat([w.detach().flatten() for w in trainer.model.parameters() if w.requires_grad])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


@pytest.mark.parametrize(("factor", "optimizer"), [(math.nan, "adamw"), (math.inf, "adamw"), (math.nan, "adamw_8bit")])
def test_a_step_that_is_not_finite_changes_nothing_at_all(base, folders, factor, optimizer):
    """The final bits are those of a run that never did that step; with dropout 0 it consumes no random numbers."""
    disturbed = run(base, folders[0], Inject(factor, 3), optimizer=optimizer)
    disturbed.run()
    without = run(base, folders[1], LeaveOut(3), optimizer=optimizer)
    without.run()
    assert torch.isfinite(weights(disturbed)).all()
    assert torch.equal(weights(disturbed), weights(without))


def test_its_rows_are_named_and_its_number_is_null(base, folders):
    folder = folders[0]
    trainer = run(base, folder, Inject(math.nan, 3))
    trainer.run()
    (event,) = lines(folder / "events.jsonl")
    rows = [ROWS.source(row) for row in next(iter_steps(trainer, 2))]
    assert (event["kind"], event["step"], event["rows"]) == ("non_finite", 3, rows)
    assert event["loss"] is None
    assert "loss NaN" in event["message"]
    metrics = {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}
    assert metrics[3] is None
    assert all(math.isfinite(loss) for step, loss in metrics.items() if step != 3)
    assert list(metrics) == list(range(1, 8))


def iter_steps(trainer, index):
    yield trainer.steps[index].rows


def test_the_schedule_goes_on_over_a_step_that_was_not_applied(base, folders):
    rates = []
    for folder, inject in zip(folders, ((), (Inject(math.nan, 3),)), strict=True):
        trainer = run(base, folder, *inject)
        trainer.run()
        rates.append([entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(("allowed", "stops_at"), [(1, 3), (3, 5)])
def test_too_many_in_a_row_end_the_run(base, folders, allowed, stops_at):
    trainer = run(base, folders[0], Inject(math.nan, *range(3, 99)), max_bad_steps=allowed)
    with pytest.raises(TrainingError, match=rf"step {stops_at}: loss NaN") as caught:
        trainer.run()
    assert caught.value.exit_code != 0
    assert "\n" not in str(caught.value)
    steps = [line["step"] for line in lines(folders[0] / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) <= stops_at + 1, "the host ran more than one step ahead"
    assert torch.isfinite(weights(trainer)).all()


def test_single_ones_do_not_end_it_however_many_there_are(base, folders):
    trainer = run(base, folders[0], Inject(math.nan, 2, 4, 6), max_bad_steps=2)
    trainer.run()
    assert trainer.state.global_step == 7
    assert [event.step for event in trainer.events.seen] == [2, 4, 6]


def test_every_checkpoint_of_a_bad_run_is_finite(base, folders):
    trainer = run(base, folders[0], Inject(math.nan, *range(3, 99)), save_steps=1, keep_last=9, max_bad_steps=4)
    with pytest.raises(TrainingError):
        trainer.run()
    saved = sorted((folders[0] / "checkpoints").glob("step-*"))
    assert saved
    for folder in saved:
        for path in folder.rglob("*.safetensors"):
            assert all(
                bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values() if tensor.is_floating_point()
            )


def test_a_non_finite_adapter_is_never_saved(base, folders):
    from lorafit.methods.lora import save_adapter

    trainer = run(base, folders[0])
    with torch.no_grad():
        next(weight for weight in trainer.model.parameters() if weight.requires_grad)[0, 0] = math.inf
    with pytest.raises(AdapterError, match="not saved"):
        save_adapter(trainer.model, folders[0] / "adapter", trainer.config, base_name="x")
    assert not (folders[0] / "adapter").exists()


SPIKE = MIN_SEEN + 4


def test_a_spike_is_written_down_with_its_rows_and_the_run_goes_on(base, folders):
    trainer = run(base, folders[0], Inject(30.0, SPIKE), max_steps=SPIKE + 2, lr=1e-4)
    trainer.run()
    (event,) = lines(folders[0] / "events.jsonl")
    assert (event["kind"], event["step"], len(event["rows"])) == ("spike", SPIKE, 2)
    assert event["loss"] > event["threshold"] > event["median"]
    assert trainer.state.global_step == SPIKE + 2


def test_rolled_back_the_run_ends_as_if_the_step_had_been_left_out(base, folders):
    given = {"max_steps": SPIKE + 5, "lr": 1e-4, "save_steps": 3, "dropout": 0.2, "on_spike": "rollback"}
    disturbed = run(base, folders[0], Inject(30.0, SPIKE), **given)
    disturbed.run()
    without = run(base, folders[1], LeaveOut(SPIKE), **given)
    without.run()
    assert [event.kind for event in disturbed.events.seen] == ["spike", "rollback"]
    assert disturbed.events.seen[1].details["checkpoint"] == f"step-{SPIKE - SPIKE % 3 or 3:06d}"
    assert torch.equal(weights(disturbed), weights(without))
    assert [line["step"] for line in lines(folders[0] / "metrics.jsonl")] == list(range(1, SPIKE + 6))


def test_a_run_that_is_killed_around_a_rollback_ends_in_the_same_bits(base, folders):
    given = {
        "max_steps": SPIKE + 5,
        "lr": 1e-4,
        "save_steps": 3,
        "keep_last": 99,
        "dropout": 0.2,
        "on_spike": "rollback",
    }
    whole = run(base, folders[0], Inject(30.0, SPIKE), **given)
    whole.run()
    for step in (SPIKE - SPIKE % 3 - 3, SPIKE + 1):  # before it, and after
        again = run(base, folders[1], Inject(30.0, SPIKE), **given)
        again.run(folders[0] / "checkpoints" / f"step-{step:06d}")
        assert torch.equal(weights(whole), weights(again))


def test_a_checkpoint_remembers_what_was_left_out(base, folders):
    given = {"max_steps": SPIKE + 5, "lr": 1e-4, "save_steps": 3, "on_spike": "rollback"}
    disturbed = run(base, folders[0], Inject(30.0, SPIKE), **given)
    disturbed.run()
    newest = max((folders[0] / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["run"]["left_out"] == [SPIKE]


def test_without_a_checkpoint_a_spike_is_only_written_down(base, folders):
    given = {"max_steps": SPIKE + 2, "lr": 1e-4, "save_steps": 1000, "on_spike": "rollback"}
    trainer = run(base, folders[0], Inject(30.0, SPIKE), **given)
    (folders[0] / "checkpoints").write_text("no folder")
    trainer.run()
    kinds = [event.kind for event in trainer.events.seen]
    assert kinds == ["checkpoint_failed", "spike", "rollback_impossible", "checkpoint_failed"]
    assert trainer.state.global_step == SPIKE + 2


def test_there_is_a_checkpoint_to_go_back_to_before_any_loss_can_be_a_spike(base, folders):
    """So whether one is rolled back depends neither on the clock nor on signals that asked for a checkpoint."""
    given = {"max_steps": SPIKE + 2, "lr": 1e-4, "save_steps": 1000, "save_minutes": 0, "on_spike": "rollback"}
    trainer = run(base, folders[0], Inject(30.0, SPIKE), **given)
    trainer.run()
    assert [event.kind for event in trainer.events.seen] == ["spike", "rollback"]
    assert trainer.events.seen[1].details["checkpoint"] == f"step-{MIN_SEEN:06d}"


def test_an_evaluation_that_is_not_finite_is_an_event(base, folders):
    trainer = run(base, folders[0])
    hook = trainer.model.get_base_model().model.norm.register_forward_hook(lambda *given: given[2] * math.nan)
    assert math.isnan(trainer.evaluate(ROWS)["eval_loss"])
    hook.remove()
    assert [event.kind for event in trainer.events.seen] == ["non_finite_evaluation"]


class TestSpikeRule:
    def test_it_is_the_median_and_the_median_deviation(self):
        rule = SpikeRule()
        for loss in [1.0, 2.0, 3.0, 4.0, 5.0] * 4:
            rule.add(loss)
        assert rule.threshold() == pytest.approx(3.0 + 8.0 * 1.4826 * 1.0)

    def test_it_waits_for_enough_steps(self):
        rule = SpikeRule()
        for loss in [1.0] * (MIN_SEEN - 1):
            rule.add(loss)
        assert rule.threshold() == math.inf

    def test_losses_that_hardly_vary_are_no_reason_to_cry(self):
        rule = SpikeRule()
        for _ in range(WINDOW):
            rule.add(5.0)
        assert rule.threshold() == pytest.approx(5.0 + 8.0 * 0.1)

    def test_rows_known_by_heart_are_no_reason_either(self):
        """Two rows a step of the demo's dates, third epoch: a median of 0.003 with a tail up to 0.3."""
        rule = SpikeRule()
        for step in range(WINDOW):
            rule.add(0.3 if step % 20 == 19 else 0.003)
        assert 0.3 < rule.threshold() == pytest.approx(0.403)

    def test_a_new_level_becomes_normal_within_half_a_window(self):
        rule = SpikeRule()
        for _ in range(WINDOW):
            rule.add(1.0)
        spikes = 0
        for _ in range(WINDOW):
            spikes += rule.threshold() < 3.0
            rule.add(3.0)
        assert spikes <= WINDOW // 2

    def test_noise_of_a_falling_loss_is_no_spike(self):
        generator = torch.Generator().manual_seed(0)
        rule, seen = SpikeRule(), 0
        for step in range(3000):
            loss = 0.4 + 2.0 * math.exp(-step / 200) + 0.05 * float(torch.randn((), generator=generator))
            seen += loss > rule.threshold()
            rule.add(loss)
        assert seen == 0


def test_a_resumed_judge_judges_as_the_one_that_went_on(base):
    config = settings(base=base, max_bad_steps=4)
    seen = [(1.0, 1.0), (1.1, 2.0), (0.9, math.inf), (math.nan, math.nan)] * 10 + [(0.9, math.nan)]
    one, two = (LossMonitor(config, ROWS, EventLog(), "here") for _ in range(2))
    for step, (loss, grad_norm) in enumerate(seen):
        one.judge(StepNumbers(step, 0.0, 0.0, 1, (), loss, grad_norm))
    two.start({"step": step, "loss": loss, "grad_norm": norm} for step, (loss, norm) in enumerate(seen))
    assert list(one.spikes.losses) == list(two.spikes.losses)
    assert one.bad_in_a_row == two.bad_in_a_row == 3


def test_weights_that_an_update_itself_made_infinite_are_never_saved(base, folders):
    """The loss and the norm were finite, the learning rate was not sane: only the saver can see it."""
    trainer = run(base, folders[0], lr=1e39, warmup=0, save_steps=1, max_bad_steps=3)
    with pytest.raises(TrainingError, match="not finite"):
        trainer.run()
    assert not list((folders[0] / "checkpoints").glob("step-*"))
    assert "checkpoint_failed" in {event.kind for event in trainer.events.seen}
