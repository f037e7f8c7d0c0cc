import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafit.export import TransformersModel
from lorafit.export.verify.comparison import Reference
from tiny_models import FAMILIES, save_base


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base") / "llama")
    return TransformersModel(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))


def test_a_model_compared_with_itself_is_at_zero(model, rows):
    reference = Reference.of(model, rows)
    same = reference.compare(model)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.top1_agreement == 1
    assert same.loss == pytest.approx(reference.loss)


def test_rows_beyond_the_memory_limit_are_left_out_in_order(model, rows):
    one = rows[0][1].sum() * 260 * 4
    reference = Reference.of(model, rows, max_bytes=int(2.5 * one))
    assert len(reference.rows) == 2 and reference.positions == 2 * rows[0][1].sum()
    assert reference.rows[1] is rows[1]
    assert len(Reference.of(model, rows, max_bytes=1).rows) == 1  # never none


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_predicts_the_token_after_it_in_each_family(tmp_path, rows, family):
    model = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base", family), dtype=torch.float32).eval()
    ids, mask = rows[0]
    found = TransformersModel(model).log_probabilities(rows[0])
    with torch.no_grad():
        logits = model(torch.tensor(ids[None].astype(np.int64))).logits[0].float()
    expected = logits[np.flatnonzero(mask) - 1].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
