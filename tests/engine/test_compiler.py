"""The compiler made ready in the background: it does its part, and nothing that a loading model could notice."""

import sys

import torch

from lorafit.engine import warm_compiler

room = sys.modules["lorafit.engine.runtime"]


def state():
    return (
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        dict(vars(torch.nn.Module)),
    )


def test_it_leaves_the_main_thread_alone(monkeypatch):
    traced = []
    monkeypatch.setattr(torch.fx.Tracer, "trace", lambda *unused: traced.append(1))
    monkeypatch.setattr(torch._dynamo.convert_frame, "_compile", lambda *unused, **more: traced.append(1))
    before = state()
    warm_compiler().join()
    assert state() == before
    # tracing patches nn.Module for all threads, and compiling puts random states back
    assert not traced


def test_what_it_imports_is_there_or_passed_over():
    warm_compiler().join()
    assert "torch._inductor.compile_fx" in sys.modules
    assert any(name in sys.modules for name in room.SLOW_IMPORTS)
