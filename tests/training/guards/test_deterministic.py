"""deterministic: torch's own switch, set within and put back after."""

import pytest
import torch

from lorafit.errors import TrainingError
from lorafit.training import deterministic


def test_only_deterministic_kernels_run_within_and_everything_is_put_back(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_nothing_changes_unless_asked(monkeypatch):
    import os

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_operation_without_such_a_kernel_is_one_sentence():
    words = "cumsum_cuda_kernel does not have a deterministic implementation, but you set it. You can turn it off"
    with (
        pytest.raises(TrainingError, match=r"cumsum_cuda_kernel.*without --deterministic") as caught,
        deterministic(True),
    ):
        raise RuntimeError(words)
    assert "\n" not in str(caught.value)
