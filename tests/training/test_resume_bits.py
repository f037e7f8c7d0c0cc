"""A run that is interrupted anywhere and goes on ends in the same bits as one that was not."""

import shutil

import numpy as np
import pytest
import torch

from little_trainer import assert_same, bits, trainer
from lorafit.errors import CheckpointError
from lorafit.training.trainer import LorafitTrainer
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = trainer(base, folder)
    run.run()
    return run, folder


@pytest.mark.parametrize("step", [1, 3, 4, 7, 8])
def test_a_resumed_run_ends_in_the_bits_of_the_undisturbed_one(undisturbed, base, tmp_path, step):
    """Four steps an epoch: within the first epoch, at its end, and within and at the end of later ones."""
    whole, folder = undisturbed
    torch.manual_seed(step)  # a new process has other random states
    np.random.seed(step)
    again = trainer(base, tmp_path)
    again.run(folder / f"step-{step:06d}")
    assert_same(whole, again)


def test_transformers_own_way_to_say_it_goes_on_from_the_newest_that_verifies(undisturbed, base, tmp_path):
    whole, folder = undisturbed
    for step in (5, 6):
        shutil.copytree(folder / f"step-{step:06d}", tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000006" / "optimizer.safetensors").write_bytes(b"")
    again = trainer(base, tmp_path)
    LorafitTrainer(again).train(resume_from_checkpoint=True)
    assert_same(whole, again)


def test_a_damaged_checkpoint_is_refused_even_when_it_is_named(undisturbed, base, tmp_path):
    copied = shutil.copytree(undisturbed[1] / "step-000005", tmp_path / "step-000005")
    (copied / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json has 2 of"):
        trainer(base, tmp_path).run(copied)
    with pytest.raises(CheckpointError, match="no checkpoint in this folder verifies"):
        LorafitTrainer(trainer(base, tmp_path / "none")).train(True)


@pytest.mark.parametrize("given", [{"optimizer": "adamw_8bit", "rank": 64}, {"quantization": "none"}], ids=str)
def test_eight_bit_moments_and_an_unquantised_base_resume_to_the_same_bits(base, tmp_path, given):
    whole = trainer(base, tmp_path / "whole", max_steps=6, **given)
    whole.run()
    if "optimizer" in given:
        assert any(tensor.dtype == torch.uint8 for tensor in bits(whole)[0].values() if tensor.numel() > 4000)
    again = trainer(base, tmp_path / "again", max_steps=6, **given)
    again.run(tmp_path / "whole" / "step-000003")
    assert_same(whole, again)
