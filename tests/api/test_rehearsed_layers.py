"""What the rehearsal runs is what training runs."""

import itertools
import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from little_run import encoded_rows, settings
from lorafit.adapters import attach
from lorafit.api import rehearsed_layers as module
from lorafit.api.rehearsed_layers import _work, enforce_budget, rehearsed_layers
from lorafit.backbone import load_backbone
from lorafit.config import RunDir, resolve
from lorafit.config.dial import Dial
from lorafit.engine import PAGE_BYTES, Rehearsal
from lorafit.engine.attention.packed import PACKED
from lorafit.training import LorafitTrainer
from lorafit.training import trainer as trainer_module


def test_the_rehearsal_computes_under_the_autocast_of_training(tmp_path, monkeypatch):
    made = trainer_module.training_arguments

    def in_bf16(*given, **options):
        arguments = made(*given, **options).to_dict() | {"bf16": True, "output_dir": str(tmp_path)}
        known = TrainingArguments.__dataclass_fields__
        return TrainingArguments(**{key: value for key, value in arguments.items() if key in known})

    monkeypatch.setattr(trainer_module, "training_arguments", in_bf16)
    config = settings(max_steps=1, rank=2)
    model = attach(load_backbone(config), config)
    trainer = LorafitTrainer(model, config, encoded_rows(9, 12, 15), None, tmp_path)
    seen = []

    def note(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), model.training))

    handle = model.get_base_model().get_decoder().layers[0].register_forward_pre_hook(note)
    work = _work(trainer)
    work.loss_of(work.batch_of(config.max_tokens), 1.0)
    trainer.train()
    handle.remove()
    assert len(seen) == 2 and seen[0] == seen[1] == (True, torch.bfloat16, True)


def test_a_budget_leaves_room_for_what_a_growing_block_takes_beyond_torchs_limit(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    enforce_budget(resolve(flags={"base": "any", "vram": "8GiB"}).config)
    enforce_budget(resolve(flags={"base": "any"}).config)
    assert [round(fraction * (80 << 30)) for fraction in fractions] == [(8 << 30) - PAGE_BYTES]


def test_the_largest_micro_batch_is_rehearsed(tmp_path):
    config = settings(max_steps=1, rank=2, max_tokens=64, examples_per_step=4)
    model = attach(load_backbone(config), config)
    rows = encoded_rows(9, 12, 15, 30, 31, 32, 20, 8)
    work = _work(LorafitTrainer(model, config, rows, None, tmp_path))
    assert work.longest == 32
    assert 32 < work.batch_of(64).tokens <= 64
    assert work.batch_of(16).tokens == 32  # a row is never cut


ROWS = encoded_rows(9, 12, 15, 30, 31, 32, 20, 8)
LARGEST = sum((9, 12, 15, 30, 31, 32, 20, 8))  # all eight are one step


@pytest.fixture
def on_a_card(monkeypatch):
    """A CPU passes for a card whose rehearsal finds `dial`; what it was asked to fit stands in `works`."""
    works = []

    def found(model, layers, work, budget, *, solves):
        assert model.config._attn_implementation == PACKED  # of its backward passes too
        works.append((work, solves, layers.dial))
        dial = on_a_card.dial if solves else layers.dial
        figures = {field.name: 0 for field in fields(Rehearsal)}
        return Rehearsal(**figures | {"dial": dial, "schedule": ()})

    on_a_card.dial, on_a_card.works = Dial(), works
    monkeypatch.setattr(module, "rehearse", found)
    monkeypatch.setattr(module, "budget_bytes", lambda config: 2)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: torch.device("cuda")))
    return on_a_card


def rehearsed(trainer, run, **given):
    resolved = resolve(flags={"base": trainer.config.base, "compile": "off", **given})
    trainer.config = resolved.config
    with rehearsed_layers(trainer, resolved, run) as rehearsal:
        return rehearsal


@pytest.fixture
def trainer(tmp_path):
    config = settings(max_steps=1, rank=2, max_tokens=64, examples_per_step=8)
    return LorafitTrainer(attach(load_backbone(config), config), config, ROWS, None, tmp_path / "checkpoints")


GIVEN = {"max_tokens": 64, "examples_per_step": 8, "max_steps": 1}


def test_graphs_last_as_long_as_training(trainer, tmp_path, on_a_card):
    resolved = resolve(flags={"base": trainer.config.base, "compile": "off", **GIVEN})
    trainer.config, on_a_card.dial = resolved.config, Dial(graphs=64)
    with rehearsed_layers(trainer, resolved, RunDir(tmp_path)):
        graphs = trainer.graphs
        assert (graphs.longest, graphs.arena_bytes) == (32, 0)
        assert {id(weight) for weight in graphs.trained} == {id(weight) for weight in trainer._trained}
        graphs._frames["bucket"] = SimpleNamespace(graph=None)
        graphs.tell("why")
    assert trainer.graphs is None and not graphs._frames
    assert [event.kind for event in trainer.events.seen] == ["no_graphs"]


def test_a_run_that_was_tight_goes_on_with_the_dial_that_it_was_turned_to(trainer, tmp_path, on_a_card):
    retries = itertools.count()
    resolved = resolve(flags={"base": trainer.config.base, "compile": "off", **GIVEN})
    trainer.config, on_a_card.dial, run = resolved.config, Dial(offload=1), RunDir(tmp_path)
    with rehearsed_layers(trainer, resolved, run):
        watch = trainer.callback_handler.callbacks[-1]
        watch.layers.follow((0, 0, 1), lambda: watch.layers.follow((0, 1, 1)) or True)
        watch.retries = lambda: next(retries)
        for step in range(1, 4):
            watch.on_step_begin(None, None, None)
            watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert [event.kind for event in trainer.events.seen] == ["tight_memory"]
    known = json.loads(run.engine.read_text())
    assert known["schedule"] == [0, 1, 1] and known["dial"].startswith("offload=1")


@pytest.mark.parametrize("dial", [Dial(), Dial(whole=2)])
def test_without_graphs_none_are_made(trainer, tmp_path, on_a_card, dial):
    resolved = resolve(flags={"base": trainer.config.base, "compile": "off", **GIVEN})
    trainer.config, on_a_card.dial = resolved.config, dial
    with rehearsed_layers(trainer, resolved, RunDir(tmp_path)):
        assert trainer.graphs is None


@pytest.mark.parametrize(
    ("found", "written", "micro_tokens"),
    [
        (Dial(), f"micro_tokens={LARGEST}", LARGEST),
        (Dial(whole=2, micro_tokens=78), "whole=2,micro_tokens=78", 78),
        (Dial(whole=2, micro_tokens=64), "whole=2", 64),
    ],
)
def test_the_dial_that_is_written_says_the_micro_batch_and_a_resumed_run_has_it_again(
    trainer, tmp_path, on_a_card, found, written, micro_tokens
):
    run, on_a_card.dial = RunDir(tmp_path), found
    rehearsal = rehearsed(trainer, run, **GIVEN)
    assert json.loads(run.engine.read_text())["dial"] == str(rehearsal.dial) == written
    assert trainer.layout.micro_tokens == micro_tokens
    assert on_a_card.works[0][0].max_tokens == LARGEST
    run.settings.write_text("")
    trainer.layout.micro_tokens, on_a_card.dial = 64, Dial(whole=1)
    assert rehearsed(trainer, run, **GIVEN).dial == rehearsal.dial
    assert trainer.layout.micro_tokens == micro_tokens
    assert not on_a_card.works[1][1]


def test_a_run_begun_when_micro_batches_did_not_grow_goes_on_in_its_layout(trainer, tmp_path, on_a_card):
    run = RunDir(tmp_path)
    run.settings.write_text("")
    run.write_json(run.engine, {"dial": "whole=1", "schedule": []})
    assert rehearsed(trainer, run, **GIVEN).dial == Dial(whole=1)
    assert trainer.layout.micro_tokens == on_a_card.works[0][0].max_tokens == 64


@pytest.mark.parametrize(
    ("wish", "micro_tokens"),
    [
        ({"activations": "whole=1"}, 64),
        ({"activations": "whole=1,micro_tokens=100"}, 100),
        ({"activations": "micro_tokens=20"}, 20),
        ({"gradient_checkpointing": "on"}, 64),
    ],
)
def test_a_dial_by_hand_has_the_micro_batch_that_it_says_else_max_tokens(
    trainer, tmp_path, on_a_card, wish, micro_tokens
):
    run = RunDir(tmp_path)
    rehearsed(trainer, run, **GIVEN, **wish)
    assert trainer.layout.micro_tokens == micro_tokens
    work, solves, _ = on_a_card.works[0]
    assert (work.max_tokens, solves) == (64, False)


def test_on_a_processor_too_a_micro_batch_is_as_large_as_was_said(trainer, tmp_path):
    rehearsed(trainer, RunDir(tmp_path), **GIVEN, activations="micro_tokens=100")
    assert trainer.layout.micro_tokens == 100
    rehearsed(trainer, RunDir(tmp_path), **GIVEN)
    assert trainer.layout.micro_tokens == 64


def test_a_whole_step_is_rehearsed_where_it_is_to_run(trainer):
    work = _work(trainer, grows=True)
    assert work.max_tokens == work.batch_of(work.max_tokens).tokens == LARGEST
    assert _work(trainer).max_tokens == 64


@pytest.mark.parametrize(
    ("then", "now", "taken_up"),
    [
        # the plan's dial moves with the memory that is free: no wish of anybody's
        ({"asked": "auto", "planned": "dense=3", "vram": None}, {}, True),
        ({"asked": "auto", "planned": "dense=3", "vram": None}, {"vram": "8GiB"}, False),
        ({"asked": "auto", "planned": "dense=3", "vram": "8GiB"}, {"vram": "8GiB"}, True),
        ({"asked": "whole=1", "planned": "whole=1", "vram": None}, {}, False),
        ({"asked": "whole=1", "planned": "whole=1", "vram": None}, {"activations": "whole=1"}, True),
        # the run's own recipe has what the plan chose
        ({"asked": "auto", "planned": "dense=3", "vram": None}, {"activations": "dense=3"}, True),
        ({"asked": "auto", "planned": "dense=3", "vram": None}, {"activations": "dense=2"}, False),
        # older releases
        ({"asked": "keep"}, {}, True),
        ({}, {"activations": "keep"}, True),
        ({"asked": "keep"}, {"activations": "whole=1"}, False),
    ],
)
def test_a_run_that_goes_on_keeps_its_dial_unless_another_or_another_budget_is_asked_for(
    trainer, tmp_path, on_a_card, then, now, taken_up
):
    run, on_a_card.dial = RunDir(tmp_path), Dial(feed_forward=1)
    run.settings.write_text("")
    run.write_json(run.engine, {"dial": "whole=2,micro_tokens=78", "schedule": [], **then})
    found = rehearsed(trainer, run, **GIVEN, **now)
    assert (found.dial == Dial(whole=2, micro_tokens=78)) == taken_up
    assert not (taken_up and on_a_card.works[-1][1])
    if taken_up and "planned" in then:  # whichever way it was called
        assert then.items() <= json.loads(run.engine.read_text()).items()


def test_another_dial_given_on_the_way_is_the_one_that_runs(trainer, tmp_path, on_a_card):
    run = RunDir(tmp_path)
    rehearsed(trainer, run, **GIVEN)
    run.settings.write_text("")
    wish = {"activations": "whole=1,micro_tokens=40"}
    for _ in range(2):  # and from then on it is the run's
        assert rehearsed(trainer, run, **GIVEN, **wish).dial == Dial(whole=1, micro_tokens=40)
        assert json.loads(run.engine.read_text())["asked"] == wish["activations"]
