"""A folder that is no plain base says what it is, and its fix works."""

import pytest
from safetensors.torch import load_file, save_file

from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.config import base_folder, resolve
from lorafit.errors import BackboneError


@pytest.fixture
def base(tmp_path):
    from tiny_models import save_base

    folder = save_base(tmp_path / "base")
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def test_tensors_of_an_unmerged_adapter_are_refused(base):
    folder, tensors = base
    name = "model.layers.0.self_attn.q_proj.weight"
    for stray in ({"model.layers.0.self_attn.q_proj.lora_A.default.weight": tensors[name].clone()},
                  {name.replace(".weight", ".base_layer.weight"): tensors[name].clone()}):  # fmt: skip
        save_file({**tensors, **stray}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BackboneError, match=r"an unmerged adapter lies in the base \(1 tensors"):
            Checkpoint.open(folder)


def test_weights_under_the_name_of_a_variant_open_once_renamed(base):
    folder, tensors = base
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(BackboneError, match=r"rename model\.fp16\.safetensors to model\.safetensors"):
        Checkpoint.open(folder)
    (folder / "model.fp16.safetensors").rename(folder / "model.safetensors")
    assert Checkpoint.open(folder).names() == set(tensors)


def test_an_adapter_as_base_is_called_one(tmp_path):
    for config, base in (("{}", "ITS_BASE"), ('{"base_model_name_or_path": "org/base"}', "org/base")):
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(BackboneError, match=f"adapter, not a base; .*--base {base} --set init_adapter="):
            base_folder(str(tmp_path))


@pytest.mark.parametrize(("given", "kept"), [("none", ()), ("all", ("all",)), ("none,tensorboard", ("tensorboard",))])
def test_no_tracker_is_none(given, kept):
    assert resolve(flags={"report_to": given}).config.report_to == kept
