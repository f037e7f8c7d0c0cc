"""What the engine costs in quality: its losses beside those of its peers' libraries, and FP8's beside bf16's.

    python bench/parity.py [--base demo|FOLDER] [--compute fp32|bf16|fp8] [--steps 50] [--seed N]
    python bench/parity.py gradients [--base demo|FOLDER] [--compute bf16|fp8] [--seeds 0,1,2] [--examples N]
    python bench/parity.py fp8 [--task orders] [--seeds 0,1,2] [--floor]    # a GPU of compute capability 8.9 or more
    python bench/parity.py fp8 --task orders-worded                 # held-out loss well away from zero
    python bench/parity.py fp8 --emulate                            # on a CPU: FP8's rounding, without its speed

The first trains the same steps from the same adapters twice, through `lorafit.train` (packed rows, the frozen op, the
chunked loss, on a GPU compiled layers under the policy) and in bench/parity_reference.py (padded rows, no lorafit),
and compares each step's loss; with `--compute fp8` the other side is in bf16. A second line gives the reference
lorafit's adapters anew at each step: at a high learning rate rounding alone drives two equal trainings apart, and
`--floor`, the reference against itself with each row alone, shows how far; it also shows how far training came, for
scale.

The second takes one step from adapters whose B is not zero, through the same two sides, and compares both gradients
with that of the same rows in fp32: two sides that round alike still differ, so what matters is which of them is nearer
to the truth. lorafit may be farther from it than the reference by the factor ERROR_BOUND.

The third trains a demo task to its end in bf16 and in FP8 and compares what came of it. With `--emulate` the operands
of the frozen matmuls are rounded as on a GPU, their products summed in fp32, and all else is in fp32. `--floor` adds
the training without FP8 once more, in smaller micro-batches: the same steps but for the order of their sums. A demo
task is learnt almost whole, and what remains of its loss hangs on a handful of rows; in `orders-worded` the fields
stand in a random order under random names, as real answers hold what no model can know. Its loss is over all of the
response, its exact matches over all but the wording. A bound relative to the whole loss allows more nats than one
relative to what can be learnt: the loss of that part has columns of its own, and no bound.
All print Markdown; the exit status is 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import bitsandbytes
import parity_gradients
import parity_reference as reference
import parity_unknowable as unknowable
import peft
import torch
import transformers
from parity_products import quick_products
from transformers import TrainerCallback

from lorafit.api.train import TrainedRun, train
from lorafit.backbone import FrozenLinear4bit, computing_in
from lorafit.backbone.architecture import computes_in_fp8, default_device
from lorafit.config import load_recipe, resolve
from lorafit.demo import BASE, RECIPE, TASKS, Task, write_split
from lorafit.demo.tasks import rows as task_rows
from lorafit.errors import LorafitError, UsageError
from lorafit.evaluate import exact_match
from lorafit.export import Row, TransformersModel
from lorafit.export.verify.comparison import Reference
from lorafit.training.batches import StepDataset

LOSS_BOUND = 0.005
"""Largest relative difference of one step's loss."""
HELD_OUT_BOUND, MATCH_BOUND = 0.01, 0.01
"""Of FP8 to bf16 at the end of training: relative held-out loss, and share of exact matches."""
FLOOR_TOKENS = 256
"""Of one micro-batch where training is only to be rounded otherwise; a step of a demo task has some 600."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
TRAIN_ROWS, HELD_OUT_ROWS = 1500, 200
ENDING_TASKS = TASKS | {unknowable.TASK.name: unknowable.TASK}


class Record(TrainerCallback):
    """The arguments that training runs under, and of every step the adapters it begins with and its loss."""

    def __init__(self) -> None:
        self.adapters: list[dict[str, torch.Tensor]] = []
        self.arguments: Any = None
        self.losses: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.arguments = args
        self.adapters.append(
            {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


class EmulatedFp8(TrainerCallback):
    """From the beginning of training on, the frozen matmuls' operands are rounded to e4m3 as on a GPU."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for linear in [module for module in model.modules() if isinstance(module, FrozenLinear4bit)]:
            linear.drop_dense()
            linear.compute_dtype, linear.fp8 = torch.bfloat16, True
            linear.scale_rows()


@dataclass(frozen=True)
class Curves:
    """The losses of the same steps, one from each side."""

    ours: list[float]
    theirs: list[float]

    @property
    def differences(self) -> list[float]:
        """|ours − theirs| / theirs, step by step."""
        return [abs(one - other) / other for one, other in zip(self.ours, self.theirs, strict=True)]

    def line(self, name: str) -> str:
        """One row of the table."""
        worst, where = max((value, step) for step, value in enumerate(self.differences, 1))
        ends = f"{self.ours[0]:.5f} / {self.theirs[0]:.5f} | {self.ours[-1]:.5f} / {self.theirs[-1]:.5f}"
        return f"| {name} | {len(self.ours)} | {worst:.2g} (step {where}) | {mean(self.differences):.2g} | {ends} |"

    @property
    def agree(self) -> bool:
        """Whether each step's loss is within the bound; one that is not finite is not."""
        return all(value <= LOSS_BOUND for value in self.differences)


@dataclass(frozen=True)
class Steps:
    """What lorafit trained: each step's rows, loss and adapters before it, and how, so that others can do the same."""

    rows: list[list[reference.Row]]
    losses: list[float]
    adapters: list[dict[str, torch.Tensor]]
    recipe: reference.Recipe
    layers: str


def lorafit_steps(
    folder: Path, base: str, steps: int, examples: int, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> Steps:
    """`steps` steps of `lorafit.train` over rows of all demo tasks, so that lengths are uneven."""
    data, record = write_rows(folder / "rows.jsonl", steps * examples, settings["seed"]), Record()
    run = train(
        data, base, out=folder / "run", callbacks=[*callbacks, record], holdout=0, dropout=0.0, epochs=1,
        max_steps=steps, examples_per_step=examples, quantization="nf4", optimizer="adamw", save_steps=steps,
        ignore=("D", "P"), **settings,
    )  # fmt: skip
    config, arguments = run.resolved.config, record.arguments
    order = StepDataset(run.train_rows, config)
    rows = [[(run.train_rows.ids(row), run.train_rows.mask(row)) for row in order[step].rows] for step in range(steps)]
    recipe = reference.Recipe(
        rank=config.rank, alpha=config.alpha, lr=config.lr, schedule=str(arguments.lr_scheduler_type.value),
        warmup_steps=arguments.warmup_steps, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm,
        betas=(arguments.adam_beta1, arguments.adam_beta2), eps=arguments.adam_epsilon,
    )  # fmt: skip
    losses = [record.losses[step] for step in range(1, steps + 1)]
    return Steps(rows, losses, record.adapters, recipe, how_layers_ran(run))


def how_layers_ran(run: TrainedRun) -> str:
    """The policy that the dry run settled on, and what it noted, such as a layer that does not compile."""
    if not run.run.engine.exists():
        return f"one operation at a time, policy {run.resolved.config.memory_policy}"
    known = json.loads(run.run.engine.read_text())
    return "; ".join([f"compiled ({known['compile_s']:.0f} s), policy {known['policy']}", *known["notes"]])


def write_rows(path: Path, count: int, seed: int) -> Path:
    """`count` rows, the demo's tasks in turn."""
    drawn = [task_rows(task, seed, -(-count // len(TASKS))) for task in TASKS.values()]
    mixed = [row for turn in zip(*drawn, strict=True) for row in turn][:count]
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed), encoding="utf-8")
    return path


def compare_steps(options: argparse.Namespace) -> bool:
    """Print the table of the first mode; False when a step's loss is out of bounds."""
    base, settings = folder_of(options.base), settings_of(options, options.seed)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = lorafit_steps(Path(folder), base, options.steps, options.examples, **settings)
    free()
    return print_steps(options, base, ours)


def settings_of(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The settings of lorafit's side where steps are compared."""
    given = {"seed": seed, "compute": options.compute, "targets": options.targets, "rank": options.rank,
             "memory_policy": options.activations, "max_length": options.max_length}  # fmt: skip
    return given | ({"lr": options.lr} if options.lr else {})


def folder_of(base: str) -> str:
    """Where the base that `--base` names lies."""
    return str(BASE) if base == "demo" else base


def print_steps(options: argparse.Namespace, base: str, ours: Steps) -> bool:
    """The table's lines; whether the losses of the first agree."""
    dtype, many = DTYPES[options.compute], options.rows_per_forward
    peer = "transformers + peft + bitsandbytes" + (" in bf16" if options.compute == "fp8" else "")
    print(f"layers: {ours.layers}; learning rate {ours.recipe.lr:g}\n\n{STEPS_HEAD}", flush=True)
    padded = reference.losses(base, ours.rows, ours.adapters[0], ours.recipe, dtype, many)
    curves = Curves(ours.losses, padded)
    print(curves.line(f"{Path(options.base).name}, {options.compute}: lorafit / {peer}"), flush=True)
    at_ours = reference.losses_at(base, ours.rows, ours.adapters, ours.recipe, dtype, many)
    print(Curves(ours.losses, at_ours).line("the same, at each step from lorafit's adapters"), flush=True)
    if options.floor:
        alone = reference.losses(base, ours.rows, ours.adapters[0], ours.recipe, dtype, 1)
        print(Curves(alone, padded).line("the floor: the reference, each row alone / padded"), flush=True)
        untrained = [ours.adapters[0]] * len(ours.rows)
        still = reference.losses_at(base, ours.rows, untrained, ours.recipe, dtype, many)
        print(Curves(ours.losses, still).line("for scale: lorafit / the reference, not trained"))
    return options.compute == "fp8" or curves.agree


STEPS_HEAD = (
    "| losses of one side / the other | steps | largest relative difference | mean | first step | last step |"
    "\n|---|---|---|---|---|---|"
)


def compare_gradients(options: argparse.Namespace) -> bool:
    """Print the table of the second mode; False when lorafit is farther from fp32 than the bound allows."""
    base, within = folder_of(options.base), []
    print(f"{machine()}\n\n{parity_gradients.HEAD}", flush=True)
    for seed in (int(seed) for seed in options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            found = gradient_distances(Path(folder), base, options.examples, **settings_of(options, seed))
        print(found.line(f"{Path(options.base).name}, {options.compute}, seed {seed}"), flush=True)
        within.append(found.agree)
    return options.compute == "fp8" or all(within)


def gradient_distances(folder: Path, base: str, examples: int, **settings: Any) -> parity_gradients.Distances:
    """One step through `lorafit.train` and its peers, padded and alone, and in fp32."""
    step = parity_gradients.OneStep(settings["seed"])
    # nothing is clipped: the gradient is read after that
    ours = lorafit_steps(folder, base, 1, examples, [step], max_grad_norm=1e9, **settings)
    free()
    given, dtype = (base, ours.rows[0], ours.adapters[0], ours.recipe), DTYPES[settings["compute"]]
    padded, alone = (reference.gradients(*given, dtype, many) for many in (examples, 1))
    return parity_gradients.Distances.of(step.gradient, padded, alone, reference.exact_gradients(*given))


@dataclass(frozen=True)
class Ending:
    """A run to the end: losses over the held-out rows as trained and as served, and the share answered exactly.

    `kl` (nats a token) is from the served model to the same model in the precision it was trained in. Where the wording
    cannot be known, `match` leaves it out, and `parts` are the losses as trained of it and of the rest.
    """

    trained_loss: float
    served_loss: float
    kl: float
    match: float
    parts: unknowable.Parts | None = None


def ending(run: TrainedRun, served: torch.dtype, worded: bool = False) -> Ending:
    """How `run` ended, its model in the precision it was trained in and in `served`, which is never FP8."""
    rows = [Row(run.held_out_rows.ids(row), run.held_out_rows.mask(row)) for row in range(len(run.held_out_rows))]
    model = TransformersModel(run.model)
    with computing_in(run.model, served):
        exact = Reference.of(model, rows)
        answers = exact_match(run.model, run.held_out_rows, run.template)
    assert len(exact.rows) == len(rows), "some rows were left out"
    assert run.eval_loss is not None, "the run ended without an evaluation"
    match = unknowable.knowable_share(answers.samples) if worded else answers.share
    parts = unknowable.Parts.of(run, rows) if worded else None
    return Ending(run.eval_loss, exact.loss, exact.compare(model).kl, match, parts)


@dataclass(frozen=True)
class Arm:
    """A precision to train in, and the one to serve in; `callbacks` see the training, `activations` are its policy."""

    compute: str
    callbacks: tuple[TrainerCallback, ...] = ()
    memory_policy: str = "auto"

    @property
    def served(self) -> torch.dtype:
        return DTYPES[self.compute]


def endings(folder: Path, task: Task, seed: int, arms: Sequence[Arm], **settings: Any) -> list[Ending]:
    """`task` trained to the end in each of `arms`, from the same adapters over the same rows in the same order."""
    train_rows, held_out = settings.pop("rows", (TRAIN_ROWS, HELD_OUT_ROWS))
    data, held_out_file = write_split(task, folder / "data", seed, train_rows, held_out)
    found = []
    for number, arm in enumerate(arms):
        run = train(
            [data], out=folder / str(number), seed=seed, compute=arm.compute, holdout=str(held_out_file),
            callbacks=arm.callbacks, memory_policy=arm.memory_policy,
            **{"base": str(BASE), **load_recipe(RECIPE), **settings},
        )  # fmt: skip
        found.append(ending(run, arm.served, task is unknowable.TASK))
        # a seed takes minutes
        print(f"{task.name}, seed {seed}, {arm.compute}: {found[-1]}", file=sys.stderr, flush=True)
        del run
        free()
    return found


def compare_fp8(options: argparse.Namespace) -> bool:
    """Print the table of the third mode; False when a seed is out of bounds. Raises BackboneError without a GPU."""
    if not options.emulate:
        computes_in_fp8(resolve(flags={"compute": "fp8"}).config, default_device())
    elif torch.cuda.is_available():
        raise UsageError("FP8 is emulated on a CPU alone", where="--emulate", fix="leave it out, or hide the GPU")
    exact, fp8 = (Arm("fp32"), Arm("fp32", (EmulatedFp8(),))) if options.emulate else (Arm("bf16"), Arm("fp8"))
    arms = (exact, fp8, Arm(exact.compute, memory_policy=f"micro_tokens={FLOOR_TOKENS}"))[: 3 if options.floor else 2]
    task = ENDING_TASKS[options.task]
    settings: dict[str, Any] = {"base": folder_of(options.base)}
    settings |= {"lr": options.lr} if options.lr else {}
    settings |= {"rows": (TRAIN_ROWS, options.held_out)}
    how = f"{machine()}{'; FP8 emulated, bf16 is fp32' if options.emulate else ''}"
    print(f"{how}\n\n{endings_head(task)}", flush=True)
    within = []
    for seed in (int(seed) for seed in options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            first, second, *again = endings(Path(folder), task, seed, arms, **settings)
        print(ending_line(task.name, seed, first, second), flush=True)
        for other in again:
            print(ending_line(f"{task.name}, for fp8 read: the same in smaller micro-batches", seed, first, other))
        within.append(is_as_good(first, second))
    return all(within)


ENDINGS_HEAD = (
    "| task | seed | held-out loss, bf16 | fp8 | difference | fp8, served in bf16 | exact match, bf16 | fp8"
    " | KL of fp8-trained, in bf16 to in fp8 |\n|---|---|---|---|---|---|---|---|---|"
)


def endings_head(task: Task) -> str:
    """The head of the third mode's table."""
    parts = unknowable.PARTS_HEAD if task is unknowable.TASK else ("", "")
    return "\n".join(map(str.__add__, ENDINGS_HEAD.split("\n"), parts))


def ending_line(task: str, seed: int, exact: Ending, fp8: Ending) -> str:
    """One row of the third mode's table."""
    losses = f"{exact.trained_loss:.5f} | {fp8.trained_loss:.5f} | {loss_difference(exact, fp8):+.2%}"
    matches = f"{exact.match:.1%} | {fp8.match:.1%}"
    parts = exact.parts.columns(fp8.parts) if exact.parts and fp8.parts else ""
    return f"| {task} | {seed} | {losses} | {fp8.served_loss:.5f} | {matches} | {fp8.kl:.1e} |{parts}"


def is_as_good(exact: Ending, fp8: Ending) -> bool:
    """Whether FP8 lost no more than the bounds allow; what it won is no fault."""
    # shares of 200 rows are no exact binary fractions
    return loss_difference(exact, fp8) <= HELD_OUT_BOUND and exact.match - fp8.match <= MATCH_BOUND + 1e-9


def loss_difference(exact: Ending, fp8: Ending) -> float:
    """Relative, of the final held-out losses, each in the precision of its training."""
    return fp8.trained_loss / exact.trained_loss - 1


def machine() -> str:
    """Versions and device, as a line for the docs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (transformers, peft, bitsandbytes))
    return f"torch {torch.__version__}, {versions}; {device}"


def free() -> None:
    """The run before this one leaves the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="steps", choices=("steps", "gradients", "fp8"))
    parser.add_argument("--base", default="demo", help="demo, or a folder")
    parser.add_argument("--lr", type=float, help="default: lorafit's in steps, the demo's in fp8")
    steps = parser.add_argument_group("steps and gradients")
    steps.add_argument("--compute", choices=tuple(DTYPES), help="default: fp32 for steps, bf16 for gradients")
    steps.add_argument("--steps", type=int, default=50)
    steps.add_argument("--seed", type=int, default=0)
    steps.add_argument("--examples", type=int, default=16, help="in one step")
    steps.add_argument("--max-length", type=int, default=512, help="in one packed micro-batch")
    steps.add_argument("--rows-per-forward", type=int, default=16, help="of the reference, padded")
    steps.add_argument("--targets", default="qv", choices=("qv", "attention", "all-linear"))
    steps.add_argument("--rank", type=int, default=16)
    steps.add_argument("--activations", default="auto", help="lorafit's policy: keep, recompute, offload, …")
    steps.add_argument("--floor", action="store_true", help="also one side against itself: what rounding alone does")
    ends = parser.add_argument_group("fp8")
    ends.add_argument("--task", default="orders", choices=tuple(ENDING_TASKS))
    ends.add_argument("--seeds", default="0,1,2", help="of gradients too")
    ends.add_argument("--held-out", type=int, default=HELD_OUT_ROWS, help="rows that exact match and loss are of")
    ends.add_argument("--emulate", action="store_true", help="FP8's rounding on a CPU, beside fp32")
    options = parser.parse_args()
    options.compute = options.compute or ("bf16" if options.mode == "gradients" else "fp32")
    modes = {"steps": compare_steps, "gradients": compare_gradients, "fp8": compare_fp8}
    try:
        with quick_products():
            within = modes[options.mode](options)
    except LorafitError as error:
        sys.exit(str(error))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
