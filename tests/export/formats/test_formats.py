"""Formats are found by name, and safetensors keeps what its dtype says."""

import pytest
import torch
from safetensors.torch import load_file

from lorafit.errors import UsageError
from lorafit.export import FORMATS, format_named
from lorafit.export.formats import Safetensors
from lorafit.export.merge import merge


def test_a_format_is_found_by_its_name_and_an_unknown_one_is_refused():
    assert format_named("safetensors") is FORMATS["safetensors"]
    assert all(form.name == name for name, form in FORMATS.items())
    with pytest.raises(UsageError, match="'ggfu' is not an export format; choose safetensors"):
        format_named("ggfu")


@pytest.mark.parametrize(("dtype", "short"), [(torch.float16, "fp16"), (torch.float32, "fp32")])
def test_the_formats_precision_reaches_weights_config_and_gpu(trained, tmp_path, dtype, short):
    form = Safetensors(dtype=dtype)
    folder = merge(trained.path, out=tmp_path / "out", export_format=form).folder
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    assert f'"dtype": "{str(dtype).removeprefix("torch.")}"' in (folder / "config.json").read_text()
    assert f"saved in {short} by lorafit" in (folder / "README.md").read_text()
    assert "\nlibrary_name: transformers\n" in (folder / "README.md").read_text()
    assert form.bytes_per_weight == dtype.itemsize


def test_weights_are_rounded_once_and_integers_stay(tmp_path):
    weights = {"a": torch.randn(3, 5), "counts": torch.arange(4)}
    written = Safetensors().write(weights.items(), tmp_path)
    stored = load_file(*written.files)
    assert torch.equal(stored["a"], weights["a"].to(torch.bfloat16))
    assert torch.equal(stored["counts"], weights["counts"])
    assert written.total_bytes == 3 * 5 * 2 + 4 * 8
