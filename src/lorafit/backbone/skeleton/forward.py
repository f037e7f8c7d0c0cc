"""Forward: try the forward of a model on a row of text, with tensors without data."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lorafit.backbone.architecture import architecture_of, auto_class, failed_forward
from lorafit.errors import BackboneError

TOKENS = 8
REFUSALS = (ValueError, TypeError, KeyError, IndexError, AttributeError)
"""Errors that a family's code raises for a row of text alone, where it wants an image."""
MISFITS = ("size", "shape", "broadcast")
"""Words of torch's errors for tensors that do not fit each other."""


def require_forward(model: nn.Module) -> None:
    """Raise BackboneError if the forward of `model` fails on a row of text.

    Code that asks for the data of its tensors is not judged: training tries the forward on data.
    """
    try:
        _run(model)
    except REFUSALS as error:
        raise _failure(error) from error
    except RuntimeError as error:
        # torch's own classes tell what cannot run without data
        if type(error) is RuntimeError and any(word in str(error).lower() for word in MISFITS):
            raise _failure(error) from error


def _run(model: nn.Module) -> None:
    architecture = architecture_of(model)
    # experts are multiplied in bf16 only on the meta device
    with torch.device("meta"):
        model = auto_class(architecture).from_config(architecture, dtype=torch.bfloat16).eval()
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)


def _failure(error: Exception) -> BackboneError:
    return BackboneError(failed_forward(error), fix="choose another base")
