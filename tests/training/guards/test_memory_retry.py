"""Out of memory in the middle of a run: the same examples, the same gradient, in a layout that fits."""

import gc
import json
import random
import weakref

import pytest
import torch

from gloo_worker import LENGTHS, adapted
from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import PAGE_BYTES, packed, release_memory
from lorafit.errors import TrainingError
from lorafit.methods.lora import attach
from lorafit.training import EventLog, TunedMemory
from lorafit.training.guards.memory_retry import is_out_of_memory, row_count
from tiny_models import save_base

ROWS = encoded_rows(*LENGTHS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


class LittleMemory:
    """Forward hooks that run out of memory above `tokens` tokens a micro-batch, or when `when` says so."""

    def __init__(self, model, tokens=10**9, when=lambda: False):
        self.tokens, self.when, self.fits = tokens, when, []
        layer = model.get_base_model().model.layers[-1]
        self.hook = layer.register_forward_hook(self.run)

    def run(self, module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > self.tokens or self.when():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.fits.append(hidden.shape[1])


def trained_step(base, folder, tokens=10**9, when=lambda: False, layers=None, rows=ROWS, **given):
    config = settings(base=base, **{"max_length": 4096, "examples_per_step": len(rows), **given})
    model = adapted(config)
    tuned, events = TunedMemory(config.max_length, layers), EventLog(folder / "events.jsonl")
    trainer = training_loop(model, config, rows, None, folder, events=events, memory=tuned)
    memory = LittleMemory(model, tokens, when)
    step = trainer.steps[0]
    with packed(model):
        loss = trainer.forward_backward(step)
    return trainer, memory, gradient(model), float(loss)


@pytest.mark.parametrize("tokens", [150, 100, 60, 44])
def test_the_retried_step_has_the_gradient_and_loss_of_the_undisturbed_one(base, tmp_path, tokens):
    _, _, wanted, loss = trained_step(base, tmp_path)
    trainer, memory, got, retried = trained_step(base, tmp_path, tokens)
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5
    assert retried == pytest.approx(loss, rel=1e-6)
    assert max(memory.fits) <= tokens
    assert trainer.steps.layout.micro_tokens < sum(LENGTHS)


@pytest.mark.parametrize("seed", range(4))
def test_a_failure_at_any_micro_batch_changes_no_gradient(base, tmp_path, seed):
    chance = random.Random(seed)
    due = {chance.randrange(4)}
    calls = iter(range(10**6))
    wanted = trained_step(base, tmp_path, max_length=64)[2]
    trainer, _, got, _ = trained_step(base, tmp_path, max_length=64, when=lambda: next(calls) in due)
    assert trainer.memory_retry.times == 1
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5


def test_dropout_draws_again_from_the_same_stream(base, tmp_path):
    """A failure that changes no layout (a single row, then more recompute) leaves the very same bits."""

    class Recompute:
        policy = MemoryPolicy()

        def __init__(self):
            self.left = 1

        def reduce_memory(self):
            self.left -= 1
            return self.left >= 0

    rows, calls = encoded_rows(20), iter(range(10**6))
    torch.manual_seed(3)
    wanted = trained_step(base, tmp_path, rows=rows, dropout=0.5)[2]
    torch.manual_seed(3)
    trainer, _, got, _ = trained_step(
        base, tmp_path, rows=rows, dropout=0.5, when=lambda: next(calls) == 0, layers=Recompute()
    )
    assert trainer.memory_retry.tightened == 1
    assert torch.equal(got, wanted)


def test_the_new_layout_is_kept_and_the_rest_of_the_run_has_no_further_failure(base, tmp_path):
    config = settings(base=base, max_length=4096, examples_per_step=5, max_steps=6, lr=1e-2, save_steps=100)
    weights = []
    for tokens in (10**9, 50):
        model = attach(load_backbone(config, device="cpu"), config)
        events = EventLog()
        trainer = training_loop(model, config, ROWS, None, tmp_path / str(tokens), events=events)
        memory = LittleMemory(model, tokens)
        trainer.run()
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters() if w.requires_grad]))
    kinds = [event.kind for event in events.seen]
    assert kinds
    assert set(kinds) == {"out_of_memory"}
    assert {event.step for event in events.seen} <= {1, 2}  # the second step's longest rows may ask once more
    assert max(memory.fits) <= 50
    assert trainer.state.global_step == 6
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-4
    finding = trainer.memory_retry.finding()
    assert finding.code == "R001"
    assert finding.fix.endswith(f"memory_policy: micro_tokens={trainer.steps.layout.micro_tokens}")


def test_a_row_that_does_not_fit_alone_is_named(base, tmp_path):
    longest = LENGTHS.index(max(LENGTHS))
    with pytest.raises(TrainingError, match=rf"row:{longest + 1}: .* a single row of {max(LENGTHS)} tokens"):
        trained_step(base, tmp_path, tokens=max(LENGTHS) - 1)


def test_recompute_comes_after_single_rows_and_is_asked_until_it_helps(base, tmp_path):
    asked = []

    class Layers:
        policy = MemoryPolicy()

        def reduce_memory(self):
            asked.append(memory_of[0].tokens)
            memory_of[0].tokens += 20
            return True

    memory_of = []
    config = settings(base=base, max_length=4096, examples_per_step=len(ROWS))
    model = adapted(config)
    trainer = training_loop(model, config, ROWS, None, tmp_path, memory=TunedMemory(4096, Layers()))
    memory_of.append(LittleMemory(model, 10))
    with packed(model):
        trainer.forward_backward(trainer.steps[0])
    assert asked == [10, 30]
    assert trainer.memory_retry.tightened == 2


def test_unpacked_weights_are_given_up_before_a_micro_batch_is_halved(base, tmp_path):
    class Layers:
        policy, memory = MemoryPolicy(dequantized_layers=5), None

        def reduce_memory(self):
            self.policy = self.policy.next_smaller(2)
            return True

    layers = Layers()
    trainer, _, got, loss = trained_step(
        base, tmp_path, when=lambda: layers.policy.dequantized_layers > 1, layers=layers
    )
    assert str(layers.policy) == "dequantized_layers=1" and trainer.steps.layout.micro_tokens == 4096
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert ["stay dequantized" in event["message"] for event in events] == [True]
    whole = trained_step(base, tmp_path / "whole")
    assert torch.equal(got, whole[2]) and loss == whole[3]


def test_each_retry_is_written_down(base, tmp_path):
    trained_step(base, tmp_path, 100)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["out_of_memory"] * len(events)
    assert events[0]["micro_tokens_before"] == 4096
    assert events[-1]["micro_tokens"] <= 100
    assert "Tried to allocate 2.00 GiB" in events[0]["reason"]


def test_what_the_failed_try_held_is_free_before_the_next(base, tmp_path):
    """The traceback of the error must not keep activations alive while the step is done again."""
    held, alive = [], []

    class Big:
        pass

    def run(module, inputs, output):
        alive.append(sum(ref() is not None for ref in held))
        if len(held) < 2:
            big = Big()  # a local of a frame that the error's traceback holds
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")

    config = settings(base=base, max_length=4096, examples_per_step=len(ROWS))
    model = adapted(config)
    model.get_base_model().model.layers[0].register_forward_hook(run)
    trainer = training_loop(model, config, ROWS, None, tmp_path)
    gc.disable()
    try:
        with packed(model):
            trainer.forward_backward(trainer.steps[0])
    finally:
        gc.enable()
    assert len(held) == 2
    assert not any(alive)


def test_evaluation_survives_in_smaller_pieces_with_the_same_loss(base, tmp_path):
    config = settings(base=base, max_length=4096)
    model = adapted(config)
    trainer = training_loop(model, config, ROWS, ROWS, tmp_path)
    wanted = trainer.held_out_loss(ROWS)
    memory = LittleMemory(model, 50)
    assert trainer.held_out_loss(ROWS) == pytest.approx(wanted, rel=1e-6)
    assert max(memory.fits) <= 50
    assert trainer.steps.layout.micro_tokens == 4096  # training, which does fit, keeps its layout


@pytest.mark.parametrize("tokens", [150, 44])
def test_a_micro_batch_that_grew_to_the_step_is_halved_like_any_other(base, tmp_path, tokens):
    _, _, wanted, loss = trained_step(base, tmp_path, max_length=64)
    config = settings(base=base, max_length=64, examples_per_step=len(ROWS))
    model = adapted(config)
    trainer = training_loop(model, config, ROWS, None, tmp_path, memory=TunedMemory(sum(LENGTHS)))
    memory = LittleMemory(model, tokens)
    step = trainer.steps[0]
    assert [batch.tokens for batch in step.micro_batches] == [sum(LENGTHS)]
    with packed(model):
        retried = trainer.forward_backward(step)
    assert float((gradient(model) - wanted).norm() / wanted.norm()) <= 1e-5
    assert float(retried) == pytest.approx(loss, rel=1e-6)
    assert max(memory.fits) <= tokens
    assert f"micro_tokens={trainer.steps.layout.micro_tokens}" in trainer.memory_retry.finding().fix


def test_evaluation_takes_no_more_memory_because_steps_do(base, tmp_path):
    config = settings(base=base, max_length=64)
    model = adapted(config)
    trainer = training_loop(model, config, ROWS, ROWS, tmp_path)
    wanted = trainer.held_out_loss(ROWS)
    trainer.steps.layout.micro_tokens = 4096
    memory = LittleMemory(model)
    assert trainer.held_out_loss(ROWS) == wanted
    assert 44 <= max(memory.fits) <= 64


def test_saving_survives(base, tmp_path, monkeypatch):
    config = settings(base=base, max_length=64, examples_per_step=5, max_steps=2, save_steps=1)
    model = attach(load_backbone(config, device="cpu"), config)
    trainer = training_loop(model, config, ROWS, None, tmp_path)
    save, failures = trainer.checkpoints.save, [1, 1]

    def failing(snapshot):
        if failures:
            failures.pop()
            if len(failures) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        save(snapshot)

    monkeypatch.setattr(trainer.checkpoints, "save", failing)
    trainer.run()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001", "step-000002"]
    assert [event.kind for event in trainer.events.seen] == ["out_of_memory"]


def test_only_running_out_of_memory_is_retried(base, tmp_path):
    def broken():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trained_step(base, tmp_path, when=broken)


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("expected scalar type Float but found BFloat16"), False),
    ],
)
def test_what_running_out_of_memory_is(error, yes):
    assert is_out_of_memory(error) is yes


def test_rows_of_a_micro_batch_are_counted(base, tmp_path):
    config = settings(base=base, max_length=48, examples_per_step=10)
    trainer = training_loop(adapted(config), config, ROWS, None, tmp_path)
    assert sum(row_count(batch) for batch in trainer.steps[0].micro_batches) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_that_is_really_too_small_the_step_is_done_in_pieces(base, tmp_path):
    """The allocator itself refuses: the model and half of the activations are all there is room for."""
    options = {"max_length": 40_000, "examples_per_step": 40, "optimizer": "adamw"}
    config = settings(base=base, quantization="none", compute="fp32", **options)
    rows = encoded_rows(*([900] * 40))

    def step(room_bytes=None):
        model = attach(load_backbone(config), config)
        trainer = training_loop(model, config, rows, None, tmp_path)
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        standing = torch.cuda.memory_reserved()
        if room_bytes is not None:
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((standing + room_bytes) / whole)
        try:
            with packed(model):
                trainer.forward_backward(trainer.steps[0])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return trainer, gradient(model).cpu(), torch.cuda.max_memory_reserved() - standing

    _, wanted, room_bytes = step()
    trainer, got, used = step(room_bytes // 2)
    assert trainer.memory_retry.times >= 1
    assert {event.kind for event in trainer.events.seen} == {"out_of_memory"}
    assert used <= room_bytes // 2 + PAGE_BYTES  # a block that grows may take a page beyond torch's limit
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-3
