"""Launched runs for tests and bench/several_faults.py: `lorafit train` itself, in which one process meets harm.

The processes are forked from one that has imported everything, since imports take most of a short run.
"""

import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, update_wrapper
from pathlib import Path
from threading import Timer

import torch
from transformers import TrainerCallback

import lorafit.api.train as training
from fork_server import IMPORTED
from lorafit.api.processes import launch
from lorafit.cli import app
from lorafit.demo import BASE
from lorafit.methods.full.sharding import is_sharded, own_shard
from lorafit.training import distributed
from lorafit.training.checkpoints.snapshot import Snapshot

SETTINGS = "max_steps=8 examples_per_step=6 save_steps=2 eval_steps=4 holdout=0.1 dropout=0.1 max_bad_steps=2"


@dataclass
class Harm(TrainerCallback):
    """What happens in process `rank` after `step`: a signal, or `hang`. A gradient of process 1 is always spoiled.

    The signal comes while the checkpoint of `step` is written if `saving`, or `after_s` seconds from the start. Every
    process holds its weights against those of the others after each step.
    """

    rank: int = -1
    step: int = 0
    signal: int = 0
    hang: bool = False
    to_launcher: bool = False
    timeout_s: float = 600
    spoiled_step: int = 3
    saving: bool = False
    after_s: float = 0

    def on_step_begin(self, args, state, control, **given):
        if state.global_step + 1 != self.spoiled_step or torch.distributed.get_rank() != 1:
            return
        if is_sharded(given["model"]):  # the gradient of a gathered weight is in no parameter
            layer = given["model"].model.layers[-1]
            spoiled = layer.register_forward_hook(lambda _, given, out: (spoiled.remove(), out * float("nan"))[1])
        else:
            weight = next(weight for weight in given["model"].parameters() if weight.requires_grad)
            spoiled = weight.register_hook(lambda gradient: (spoiled.remove(), gradient * float("nan"))[1])

    def on_step_end(self, args, state, control, **given):
        digest = hashlib.sha256()
        for weight in given["model"].parameters():
            if weight.requires_grad:
                assert bool(own_shard(weight).isfinite().all()), (
                    f"a weight is not finite after step {state.global_step}"
                )
                digest.update(own_shard(weight).cpu().numpy().tobytes())
        told = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, digest.hexdigest())
        if not is_sharded(given["model"]):
            assert len(set(told)) == 1, f"the weights differ after step {state.global_step}"
        if self.saving or self.after_s:
            return
        if state.global_step == self.step and torch.distributed.get_rank() == self.rank:
            self.happen()

    def begin(self):
        """Arrange what happens at another moment than the end of a step."""
        if int(os.environ["RANK"]) != self.rank:
            return
        if self.after_s:
            Timer(self.after_s, self.happen).start()
        if self.saving:
            write = Snapshot.write_rest

            def harmed(snapshot, folder):
                if snapshot.step == self.step:
                    self.happen()
                write(snapshot, folder)

            Snapshot.write_rest = harmed

    def happen(self):
        if self.hang:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3600)
        os.kill(os.getppid() if self.to_launcher else os.getpid(), self.signal)
        time.sleep(1 if self.to_launcher else 0)  # the launcher passes it on within the step


def one_process(harm, *words):
    """One launched process of `lorafit train`."""
    torch.set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=harm.timeout_s)
    training.train = partial(training.train, callbacks=[harm])
    harm.begin()
    leave = app._leave
    app._leave = lambda code: leave(code) if code else sys.exit()
    try:
        app.main(list(words))
    except SystemExit as ended:  # the launcher takes a function's return for success, and its exit for an error
        if ended.code:
            raise


def command(world, words, harm, output):
    """The command itself, which launches `world` processes."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    launch.processes_to_start = lambda *_: 1 if "WORLD_SIZE" in os.environ else world
    # a process that has asked for the GPUs cannot fork others that use them
    way = "spawn" if torch.cuda.is_available() else "fork"
    each = update_wrapper(partial(one_process, harm), one_process)  # the launcher asks for its name
    launch.launch = lambda count, given: launch.supervise(count, each, *given, start_method=way)
    sys.argv = ["lorafit", *words]
    app.main()


@dataclass
class Ended:
    """How a command ended: exit code, standard output and error, seconds."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def sentences(self) -> list[str]:
        """What lorafit said on standard error, without the lines of torch's loggers."""
        return [line for line in self.errors.splitlines() if not line.startswith(("W1", "W0", "E1", "E0"))]


def launched(data: Path, run: Path, harm: Harm | None = None, *more: str, world: int = 2) -> Ended:
    """Run `lorafit train --gpus` to its end."""
    words = ["train", str(data), "--base", str(BASE), "--out", str(run), "--gpus", str(world), *more]
    for setting in SETTINGS.split():
        words += ["--set", setting]
    output, started = run.with_suffix(".log"), time.monotonic()
    process = IMPORTED.Process(target=command, args=(world, words, harm or Harm(), str(output)))
    process.start()
    process.join(150)
    if process.exitcode is None:
        process.terminate()
        process.join(60)
    said = [Path(f"{output}.{name}").read_text() for name in ("stdout", "stderr")]
    return Ended(process.exitcode, *said, time.monotonic() - started)
