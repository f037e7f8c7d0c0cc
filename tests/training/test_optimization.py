"""RunConfig → TrainingArguments: nothing renamed, nothing removed, nothing assumed of the machine."""

import warnings

import pytest
import torch

from little_run import settings
from lorafit.training import training_arguments

CPU = not torch.cuda.is_available()


def test_the_recipe_makes_arguments_without_a_single_deprecation(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = training_arguments(settings(), tmp_path, 100, torch.float32)
    assert arguments.max_steps == 300
    assert arguments.warmup_steps == 15
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.weight_decay == 0.01
    assert arguments.learning_rate == 2e-4
    assert (arguments.eval_steps, arguments.save_steps) == (100, 100)


@pytest.mark.skipif(not CPU, reason="about machines without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_cuda_neither_fp16_nor_a_paged_optimizer_is_asked_for(tmp_path, dtype):
    arguments = training_arguments(settings(), tmp_path, 10, dtype)
    assert not arguments.fp16
    assert not arguments.bf16
    assert arguments.optim == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("given", "steps"), [({"epochs": 3}, 30), ({"epochs": 0.25}, 3), ({"max_steps": 7}, 7), ({"max_steps": 99}, 30)]
)
def test_steps_are_epochs_rounded_up_and_capped(given, steps):
    assert settings(**given).total_steps(10) == steps
