"""Faults: callbacks that do harm at a chosen moment, and ways to damage a file. Nothing of this is in lorafit."""

import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class At(TrainerCallback):
    """Calls `harm` when step `step` ends (or begins, or is saved), and `mend` when `until` begins."""

    def __init__(
        self, step: int, harm: Callable[..., None], *, when: str = "end", until: int = 0, mend: Any = None
    ) -> None:
        self.step, self.harm, self.when, self.until, self.mend = step, harm, when, until, mend

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.mend is not None and state.global_step + 1 == self.until:
            self.mend(given["model"])
        if self.when == "begin" and state.global_step + 1 == self.step:
            self.harm(given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.when == "end" and state.global_step == self.step:
            self.harm(given["model"])

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.when == "save" and state.global_step == self.step:
            self.harm(given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.when == "train_end":
            self.harm(given["model"])


def kill(model: Any = None) -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_within(seconds: float) -> Callable[..., None]:
    """A harm that ends this process a little later, whatever it does then."""
    return lambda model: threading.Timer(seconds, kill).start()


def send(number: int) -> Callable[..., None]:
    """A harm that sends this process a signal."""
    return lambda model: os.kill(os.getpid(), number)


def send_in_evaluation(number: int) -> Callable[..., None]:
    """A harm that sends a signal in the middle of the next evaluation's first forward."""

    def harm(model: Any) -> None:
        norm = _final_norm(model)

        def once(module: Any, given: Any) -> None:
            if not model.training:
                handle.remove()
                os.kill(os.getpid(), number)

        handle = norm.register_forward_pre_hook(once)

    return harm


def spoil_gradient(value: float) -> Callable[..., None]:
    """A harm that makes one gradient of the coming step `value` times what it is: NaN or infinity spread from it."""

    def harm(model: Any) -> None:
        weight = next(weight for weight in model.parameters() if weight.requires_grad)

        def once(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return gradient * value + value

        handle = weight.register_hook(once)

    return harm


def run_out_of_memory(forwards: int) -> Callable[..., None]:
    """A harm that makes the `forwards`-th forward from now fail as CUDA does when its memory is full."""

    def harm(model: Any) -> None:
        left = [forwards]

        def hook(module: Any, given: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                handle.remove()
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")

        handle = _final_norm(model).register_forward_pre_hook(hook)

    return harm


def make_a_spike(model: Any) -> None:
    """A harm that makes the next training step's loss huge: what the last layer puts out is negated and scaled."""

    def hook(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return out * -20.0

    handle = _final_norm(model).register_forward_hook(hook)


def _final_norm(model: Any) -> Any:
    return model.get_base_model().model.norm


def limit_file_size(limit_bytes: int) -> Callable[..., None]:
    """A harm that lets no file of this process grow beyond `limit_bytes`; lift it with `lift_limit`."""

    def harm(model: Any) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))

    return harm


def lift_limit(model: Any) -> None:
    """Files may grow again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fill_disk(folder: Path) -> Callable[..., None]:
    """A harm that fills the file system `folder` is on, to the last byte."""

    def harm(model: Any) -> None:
        with (folder / "filler").open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    return harm


def empty_disk(folder: Path) -> Callable[..., None]:
    """Undo `fill_disk`."""
    return lambda model: (folder / "filler").unlink()


def block_folder(folder: Path) -> Callable[..., None]:
    """A harm that nobody can write into `folder` any more, root included: a file lies in its place."""

    def harm(model: Any) -> None:
        folder.rename(folder.with_name(folder.name + "-away"))
        folder.write_text("")

    return harm


def unblock_folder(folder: Path) -> Callable[..., None]:
    """Undo `block_folder`."""

    def mend(model: Any) -> None:
        folder.unlink()
        folder.with_name(folder.name + "-away").rename(folder)

    return mend


def turn_clock(seconds: float) -> Callable[..., None]:
    """A harm that turns the wall clock, as this process sees it."""
    real = time.time

    def harm(model: Any) -> None:
        time.time = lambda: real() + seconds

    return harm


def pause(seconds: float) -> Callable[..., None]:
    """A harm that only takes time."""
    return lambda model: time.sleep(seconds)


OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


def kill_at_operation(folder: Path, number: int) -> list[int]:
    """From here on, end this process just before its `number`-th operation on a file below `folder`; the count so far.

    Python's own operations are seen, as audit events; what safetensors writes inside is not.
    """
    count, below = [0], str(folder)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(given[0]).startswith(below):
            count[0] += 1
            if count[0] == number:
                kill()

    sys.addaudithook(hook)
    return count


DAMAGES = ("truncated", "emptied", "deleted", "bit flipped")


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Damage the file at `path` in one of the ways of DAMAGES."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "truncated":
        content = content[: draw.randrange(len(content))] if content else content
    elif how == "emptied":
        content = bytearray()
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
