"""What the dry run runs is what training runs."""

import contextlib
import itertools
import json
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.api import build_model as module
from lorafit.api.build_model import BuiltModel, _workload, enforce_budget, tune_memory
from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.demo import BASE
from lorafit.engine import PAGE_BYTES, DryRun
from lorafit.engine.attention.packed import PACKED
from lorafit.engine.row_mode import RowMode
from lorafit.methods import method_of
from lorafit.methods.lora import attach, count_parameters
from lorafit.methods.lora.lora import Lora
from lorafit.objectives import Sft
from lorafit.runs import RunDir
from lorafit.training import EventLog, StepDataset
from lorafit.training import loop as loop_module
from lorafit.training.batches import Layout
from lorafit.training.guards.memory_retry import AllocatorWatch


def built(config):
    """The model of a run, made trainable and not proved."""
    model = attach(load_backbone(config), config)
    return BuiltModel(model, method_of(config), Sft(), count_parameters(model), "")


def test_the_dry_run_computes_under_the_autocast_of_training(tmp_path, monkeypatch):
    for room in (module, loop_module):
        monkeypatch.setattr(room, "autocast_dtype", lambda model, device: torch.bfloat16)
    config = settings(max_steps=1, rank=2)
    made, rows, seen = built(config), encoded_rows(9, 12, 15), []

    def note(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), made.model.training))

    handle = made.model.get_base_model().get_decoder().layers[0].register_forward_pre_hook(note)
    work = _workload(made, config, rows, torch.device("cpu"))
    work.loss_of(work.batch_of(config.max_length), 1.0)
    training_loop(made.model, config, rows, None, tmp_path).run()
    handle.remove()
    assert len(seen) == 2 and seen[0] == seen[1] == (True, torch.bfloat16, True)


def test_a_budget_leaves_room_for_what_a_growing_block_takes_beyond_torchs_limit(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    enforce_budget(resolve(flags={"base": "any", "gpu_memory": "8GiB"}).config)
    enforce_budget(resolve(flags={"base": "any"}).config)
    assert [round(fraction * (80 << 30)) for fraction in fractions] == [(8 << 30) - PAGE_BYTES]


def test_the_largest_micro_batch_is_tried():
    config = settings(max_steps=1, rank=2, max_length=64, examples_per_step=4)
    work = _workload(built(config), config, encoded_rows(9, 12, 15, 30, 31, 32, 20, 8), torch.device("cpu"))
    assert work.longest == 32
    assert 32 < work.batch_of(64).tokens <= 64
    assert work.batch_of(16).tokens == 32  # a row is never cut


@pytest.mark.parametrize("rows", [RowMode(), RowMode("a state runs on"), RowMode("a state runs on", "and more")])
def test_only_packed_rows_are_recorded_as_cuda_graphs(rows):
    config = settings(max_steps=1, rank=2, max_length=64, examples_per_step=4)
    made = replace(built(config), rows=rows)
    work = _workload(made, config, ROWS, torch.device("cpu"))
    assert (work.within(64, 64) is None) != rows.is_packed


ROWS = encoded_rows(9, 12, 15, 30, 31, 32, 20, 8)
LARGEST = sum((9, 12, 15, 30, 31, 32, 20, 8))  # all eight are one step


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A CPU passes for a GPU whose dry run finds `policy`; what it was asked to fit stands in `works`."""
    works = []

    def found(model, layers, work, budget, *, solves):
        assert model.config._attn_implementation == PACKED  # of its backward passes too
        works.append((work, solves, layers.policy))
        policy = on_a_gpu.policy if solves else layers.policy
        figures = {field.name: 0 for field in fields(DryRun)}
        return DryRun(**figures | {"policy": policy, "schedule": ()})

    on_a_gpu.policy, on_a_gpu.works = MemoryPolicy(), works
    monkeypatch.setattr(module, "find_policy", found)
    monkeypatch.setattr(module, "budget_bytes", lambda config: 2)
    monkeypatch.setattr(module, "default_device", lambda: torch.device("cuda"))
    return on_a_gpu


GIVEN = {"max_length": 64, "examples_per_step": 8, "max_steps": 1}


@pytest.fixture
def made():
    return built(settings(rank=2, **GIVEN))


@contextlib.contextmanager
def tuned(made, run, events=None, **given):
    resolved = resolve(flags={"base": str(BASE), "compile": "off", **given})
    with tune_memory(made, resolved, ROWS, run, events or EventLog()) as found:
        yield found


def dry_run_of(made, run, **given):
    """What the dry run found, and the most tokens of a micro-batch."""
    with tuned(made, run, **given) as (memory, dry_run):
        return dry_run, memory.micro_tokens


def test_graphs_last_as_long_as_training(made, tmp_path, on_a_gpu):
    on_a_gpu.policy, events = MemoryPolicy(cuda_graph_max_tokens=64), EventLog()
    events.at(7)
    with tuned(made, RunDir(tmp_path), events, **GIVEN) as (memory, _):
        graphs = memory.graphs
        assert (graphs.longest, graphs.arena_bytes) == (32, 0)
        assert {id(weight) for weight in graphs.trained} == {id(weight) for weight in Lora().trainable(made.model)}
        graphs._frames["bucket"] = SimpleNamespace(graph=None)
        graphs.tell("why")
    assert not graphs._frames
    assert [(event.kind, event.step) for event in events.seen] == [("no_graphs", 7)]


def test_a_run_that_was_tight_goes_on_with_the_policy_that_it_was_turned_to(made, tmp_path, on_a_gpu):
    retries, run = itertools.count(), RunDir(tmp_path)
    on_a_gpu.policy, events = MemoryPolicy(offloaded_layers=1), EventLog()
    with tuned(made, run, events, **GIVEN) as (memory, _):
        assert memory.watches_allocator
        layers = memory.layers
        watch = AllocatorWatch(layers, events, retries=lambda: next(retries), on_change=memory.changed)
        layers.set_schedule((0, 0, 1), lambda: layers.set_schedule((0, 1, 1)) or True)
        for step in range(1, 4):
            watch.begin_step()
            watch.end_step(step)
    assert [event.kind for event in events.seen] == ["tight_memory"]
    known = json.loads(run.engine.read_text())
    assert known["schedule"] == [0, 1, 1] and known["policy"].startswith("offloaded_layers=1")


@pytest.mark.parametrize("policy", [MemoryPolicy(), MemoryPolicy(recompute_layers=2)])
def test_without_graphs_none_are_made(made, tmp_path, on_a_gpu, policy):
    on_a_gpu.policy = policy
    with tuned(made, RunDir(tmp_path), **GIVEN) as (memory, _):
        assert memory.graphs is None


@pytest.mark.parametrize(
    ("found", "written", "micro_tokens"),
    [
        (MemoryPolicy(), f"micro_tokens={LARGEST}", LARGEST),
        (MemoryPolicy(recompute_layers=2, micro_tokens=78), "recompute_layers=2,micro_tokens=78", 78),
        (MemoryPolicy(recompute_layers=2, micro_tokens=64), "recompute_layers=2", 64),
    ],
)
def test_the_policy_that_is_written_says_the_micro_batch_and_a_resumed_run_has_it_again(
    made, tmp_path, on_a_gpu, found, written, micro_tokens
):
    run, on_a_gpu.policy = RunDir(tmp_path), found
    dry_run, found_tokens = dry_run_of(made, run, **GIVEN)
    assert json.loads(run.engine.read_text())["policy"] == str(dry_run.policy) == written
    assert found_tokens == micro_tokens
    assert on_a_gpu.works[0][0].max_length == LARGEST
    run.settings.write_text("")
    on_a_gpu.policy = MemoryPolicy(recompute_layers=1)
    again, found_tokens = dry_run_of(made, run, **GIVEN)
    assert (again.policy, found_tokens) == (dry_run.policy, micro_tokens)
    assert not on_a_gpu.works[1][1]


def test_a_run_begun_when_micro_batches_did_not_grow_goes_on_in_its_layout(made, tmp_path, on_a_gpu):
    run = RunDir(tmp_path)
    run.settings.write_text("")
    run.write_json(run.engine, {"policy": "recompute_layers=1", "schedule": []})
    dry_run, micro_tokens = dry_run_of(made, run, **GIVEN)
    assert dry_run.policy == MemoryPolicy(recompute_layers=1)
    assert micro_tokens == on_a_gpu.works[0][0].max_length == 64


@pytest.mark.parametrize(
    ("wish", "micro_tokens"),
    [
        ({"memory_policy": "recompute_layers=1"}, 64),
        ({"memory_policy": "recompute_layers=1,micro_tokens=100"}, 100),
        ({"memory_policy": "micro_tokens=20"}, 20),
        ({"memory_policy": "recompute"}, 64),
    ],
)
def test_a_policy_by_hand_has_the_micro_batch_that_it_says_else_max_tokens(
    made, tmp_path, on_a_gpu, wish, micro_tokens
):
    run = RunDir(tmp_path)
    assert dry_run_of(made, run, **GIVEN, **wish)[1] == micro_tokens
    work, solves, _ = on_a_gpu.works[0]
    assert (work.max_length, solves) == (64, False)


def test_on_a_processor_too_a_micro_batch_is_as_large_as_was_said(made, tmp_path):
    assert dry_run_of(made, RunDir(tmp_path), **GIVEN, memory_policy="micro_tokens=100")[1] == 100
    assert dry_run_of(made, RunDir(tmp_path), **GIVEN)[1] == 64


def test_a_whole_step_is_tried_where_it_is_to_run(made):
    config, device = settings(rank=2, **GIVEN), torch.device("cpu")
    work = _workload(made, config, ROWS, device, grows=True)
    assert work.max_length == work.batch_of(work.max_length).tokens == LARGEST
    assert _workload(made, config, ROWS, device).max_length == 64


@pytest.mark.parametrize(("world", "limit"), [(1, LARGEST), (2, 81), (3, 64)])
def test_with_several_processes_the_limit_is_the_largest_share_of_a_step(made, world, limit):
    """157 tokens are dealt to two as 76 and 81; a share below max_length leaves max_length."""
    config = settings(rank=2, **GIVEN)
    work = _workload(made, config, ROWS, torch.device("cpu"), grows=True, world=world)
    layout = Layout(LARGEST)
    ranks = [StepDataset(ROWS, config, layout, rank=rank, world=world) for rank in range(world)]
    largest = max(batch.tokens for steps in ranks for batch in steps.step_of(range(8)).micro_batches)
    assert work.max_length == limit
    assert work.step_tokens == pytest.approx(LARGEST / world)
    assert work.batch_of(LARGEST).tokens == largest


@pytest.mark.parametrize(
    ("then", "now", "taken_up"),
    [
        # the plan's policy moves with the memory that is free: no wish of anybody's
        ({"asked": "auto", "planned": "dequantized_layers=3", "gpu_memory": None}, {}, True),
        ({"asked": "auto", "planned": "dequantized_layers=3", "gpu_memory": None}, {"gpu_memory": "8GiB"}, False),
        ({"asked": "auto", "planned": "dequantized_layers=3", "gpu_memory": "8GiB"}, {"gpu_memory": "8GiB"}, True),
        ({"asked": "recompute_layers=1", "planned": "recompute_layers=1", "gpu_memory": None}, {}, False),
        (
            {"asked": "recompute_layers=1", "planned": "recompute_layers=1", "gpu_memory": None},
            {"memory_policy": "recompute_layers=1"},
            True,
        ),
        # the run's own recipe has what the plan chose
        (
            {"asked": "auto", "planned": "dequantized_layers=3", "gpu_memory": None},
            {"memory_policy": "dequantized_layers=3"},
            True,
        ),
        (
            {"asked": "auto", "planned": "dequantized_layers=3", "gpu_memory": None},
            {"memory_policy": "dequantized_layers=2"},
            False,
        ),
        # older releases
        ({"asked": "keep"}, {}, True),
        ({}, {"memory_policy": "keep"}, True),
        ({"asked": "keep"}, {"memory_policy": "recompute_layers=1"}, False),
    ],
)
def test_a_run_that_goes_on_keeps_its_policy_unless_another_or_another_budget_is_asked_for(
    made, tmp_path, on_a_gpu, then, now, taken_up
):
    run, on_a_gpu.policy = RunDir(tmp_path), MemoryPolicy(recompute_mlp_layers=1)
    run.settings.write_text("")
    run.write_json(run.engine, {"policy": "recompute_layers=2,micro_tokens=78", "schedule": [], **then})
    found, _ = dry_run_of(made, run, **GIVEN, **now)
    assert (found.policy == MemoryPolicy(recompute_layers=2, micro_tokens=78)) == taken_up
    assert not (taken_up and on_a_gpu.works[-1][1])
    if taken_up and "planned" in then:  # whichever way it was called
        assert then.items() <= json.loads(run.engine.read_text()).items()


def test_another_policy_given_on_the_way_is_the_one_that_runs(made, tmp_path, on_a_gpu):
    run = RunDir(tmp_path)
    dry_run_of(made, run, **GIVEN)
    run.settings.write_text("")
    wish = {"memory_policy": "recompute_layers=1,micro_tokens=40"}
    for _ in range(2):  # and from then on it is the run's
        assert dry_run_of(made, run, **GIVEN, **wish)[0].policy == MemoryPolicy(recompute_layers=1, micro_tokens=40)
        assert json.loads(run.engine.read_text())["asked"] == wish["memory_policy"]
