"""The memory of recurrent layers, counted without data, beside a training step with data."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone.architecture import read_architecture, skeleton
from lorafit.backbone.skeleton.live_bytes import LiveBytes
from lorafit.backbone.skeleton.recurrence import recurrences_of, recurrent_parts
from lorafit.backbone.skeleton.sizes import sizes_of
from lorafit.memory.footprint import Execution, Trained, activations
from lorafit.memory.inputs import MicroBatchSize
from lorafit.memory.recurrent_layers import with_recurrent_layers
from lorafit.shapes import ModelShape
from lorafit.shapes import shape as shapes


def shape_of(config, tmp_path, monkeypatch):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(shapes, "skeleton_sizes", lambda *unused: sizes_of(tmp_path))
    return ModelShape.from_base(str(tmp_path))


def measured_peak(config, rows, length):
    """Return the most bytes alive in forward and backward of the decoder, in fp32."""
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).train()
    hidden = torch.randn(rows, length, config.hidden_size, requires_grad=True)
    with LiveBytes([*model.parameters(), *model.buffers(), hidden]) as live:
        out = model.get_decoder()(inputs_embeds=hidden, use_cache=False)[0]
        out.backward(torch.ones_like(out))
    return live.peak


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid"])
def test_the_planned_peak_of_a_hybrid_is_that_of_a_real_step(family, tmp_path, monkeypatch):
    """Neither rows nor length are among the counted ones."""
    rows, length = 3, 192
    config = small_config(family)
    shape = shape_of(config, tmp_path, monkeypatch)
    batch = MicroBatchSize(rows * length, rows * length, length)
    eager = activations(shape, Trained(), batch, width=4, execution=Execution())
    live = with_recurrent_layers(eager, eager, shape, batch, 4)
    planned = shape.layers * live.layer_bytes + live.backward_bytes
    assert planned == pytest.approx(measured_peak(config, rows, length), rel=0.1)
    assert live.heaviest_bytes > live.layer_bytes * 0.99 > eager.layer_bytes


def test_a_family_without_a_state_has_no_recurrence(tmp_path):
    small_config("qwen3").save_pretrained(tmp_path)
    model = skeleton(read_architecture(tmp_path))
    assert recurrences_of(model) == []
    assert not any(map(recurrent_parts, model.modules()))


def test_live_bytes_counts_a_storage_once_and_forgets_it():
    weight = torch.ones(8, 8)
    with LiveBytes([weight]) as live:
        view = weight.t()
        product = view @ weight
        part = product[:2]
        assert live.now == 256
        del product
        assert live.now == 256  # the view holds it
        del part
        assert live.now == 0
        assert live.peak == 256
