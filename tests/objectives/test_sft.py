"""Sft: the sum over supervised tokens, to be divided once by their number over the whole step."""

import pytest
import torch

from little_run import encoded_rows, settings
from lorafit.backbone import load_backbone
from lorafit.engine import packed
from lorafit.objectives import Sft
from tiny_models import save_base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = str(save_base(tmp_path_factory.mktemp("base")))
    return load_backbone(settings(base=base, quantization="none"), device="cpu")


def test_its_weight_is_the_supervised_tokens_of_the_rows_that_were_chosen():
    rows, sft = encoded_rows(20, 9, 30), Sft()
    chosen = [0, 2]
    assert sft.weight(rows, chosen) == sft.collate(rows, chosen).supervised
    assert sft.weight(rows) == sft.weight(rows, [0, 1, 2])


def test_losses_of_micro_batches_add_up_to_that_of_all_rows_in_one(model):
    rows, sft = encoded_rows(20, 9, 30), Sft()
    with packed(model), torch.no_grad():
        whole = sft.loss(model, sft.collate(rows, [0, 1, 2]))
        parts = sum(sft.loss(model, sft.collate(rows, [row])) for row in range(3))
        half = sft.loss(model, sft.collate(rows, [0, 1, 2]), 0.5)
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-6)
