import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.backbone import load_backbone
from lorafit.config import RunConfig
from lorafit.errors import AdapterError, RunDirError, VerificationError
from lorafit.methods.lora import AdapterSnapshot, Delta, Deltas, attach, load_adapter, restore_adapter, save_adapter
from tiny_models import save_base, some_ids, stir


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return RunConfig(base=str(save_base(tmp_path_factory.mktemp("base") / "llama")), dropout=0.0, rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def trained(config):
    model = attach(load_backbone(config), config)
    stir(model)
    return model.eval()


@pytest.fixture
def saved(trained, config, tmp_path):
    save_adapter(trained, tmp_path / "adapter", config, base_name="org/base")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(config, folder, *words):
    with pytest.raises(AdapterError) as caught:
        load_adapter(load_backbone(config), folder)
    assert all(word in caught.value.sentence for word in words), caught.value.sentence
    assert "\n" not in caught.value.sentence


def test_loading_gives_back_the_model_that_was_saved(trained, saved, config):
    again = load_adapter(load_backbone(config), saved)
    assert torch.equal(again(some_ids()).logits, trained(some_ids()).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_plain_peft_loads_it_and_finds_the_bases_name(trained, saved, config):
    plain = peft.PeftModel.from_pretrained(load_backbone(config), saved)
    assert torch.equal(plain(some_ids()).logits, trained(some_ids()).logits)
    described = peft.PeftConfig.from_pretrained(saved)
    assert described.base_model_name_or_path == "org/base" and described.inference_mode
    assert described.r == 4 and described.lora_alpha == 8 and described.bias == "none"


def test_saving_leaves_the_model_training(trained, saved):
    assert trained.peft_config["default"].inference_mode is False


def test_the_files_are_safetensors_and_the_same_every_time(trained, saved, config, tmp_path):
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    save_adapter(trained, tmp_path / "twin", config, base_name="org/base")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "twin" / path.name).read_bytes()
    assert json.loads((saved / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    assert all(tensor.dtype == torch.float32 for tensor in load_file(saved / "adapter_model.safetensors").values())


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(trained, saved, config):
    (saved / "stale.txt").write_text("x")
    save_adapter(trained, saved, config, base_name="org/base")
    assert not (saved / "stale.txt").exists()
    assert list(saved.parent.iterdir()) == [saved]


def test_a_save_that_fails_leaves_the_old_adapter_whole(trained, saved, config, monkeypatch):
    before = (saved / "adapter_model.safetensors").read_bytes()

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorafit.methods.lora.adapter_folder.save_file", disk_full)
    with pytest.raises(RunDirError, match="No space left on device"):
        save_adapter(trained, saved, config, base_name="org/base")
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_adapter_that_is_not_finite_is_not_saved(config, tmp_path):
    model = attach(load_backbone(config), config)
    stir(model, std=math.nan)
    with pytest.raises(AdapterError, match="NaN"):
        save_adapter(model, tmp_path / "adapter", config, base_name="b")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ".*proj"}, ["regular expression"]),
        ({"target_modules": ["q_proj", ".*"]}, ["no list of module names"]),
        ({"target_modules": []}, ["no list of module names"]),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, ["auto_mapping"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"use_dora": True}, ["lacks its magnitude"]),
        ({"bias": "all"}, ["bias"]),
        ({"rank_pattern": {".*": 4}}, ["rank_pattern"]),
        ({"layers_pattern": ".*"}, ["layers_pattern"]),
        ({"some_new_key": 1}, ["some_new_key"]),
        ({"megatron_core": "os"}, ["megatron_core"]),
        ({"peft_type": "IA3"}, ["IA3"]),
        ({"r": 0}, ["rank 0"]),
        ({"r": "16"}, ["rank 16"]),
        ({"r": 10**9}, ["rank"]),
        ({"r": 8}, ["rank 8"]),
        ({"lora_alpha": math.inf}, ["alpha"]),
        ({"lora_alpha": -1}, ["alpha"]),
        ({"lora_alpha": 1e9}, ["over 1024"]),
        ({"target_modules": ["q_proj"]}, ["does not fit"]),
    ],
)
def test_an_adapter_that_asks_for_more_than_plain_lora_is_refused(config, saved, changes, words):
    edit(saved, **changes)
    refuses(config, saved, *words)


@pytest.mark.parametrize("name", ["adapter_model.bin", "extra.pt", "x.pkl"])
def test_pickles_are_refused_even_beside_good_weights(config, saved, name):
    (saved / name).write_bytes(b"x")
    refuses(config, saved, name, "pickle")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_broken_file_is_named(config, saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    refuses(config, saved, name)
    (saved / name).unlink()
    refuses(config, saved, name)


def damage(saved, change):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, min(key for key in tensors if "lora_A" in key))
    save_file(tensors, path)


def test_odd_tensors_are_refused(config, saved, tmp_path):
    def broken(change, *words):
        copy = shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True)
        damage(copy, change)
        refuses(config, copy, *words)

    broken(lambda t, key: t[key].fill_(math.nan), "NaN")
    broken(lambda t, key: t.pop(key), "lacks its A")
    broken(lambda t, key: t.update({key: t[key][:2]}), "rank 4")
    broken(lambda t, key: t.update({key: t[key][:, :8].contiguous()}), "shape")
    broken(lambda t, key: t.update({"model.embed_tokens.weight": torch.ones(2, 2)}), "no LoRA weight")
    broken(lambda t, key: t.update({key: torch.ones(4, 64, dtype=torch.int32)}), "no matrix")
    broken(lambda t, key: t.clear(), "no weights")


def test_an_adapter_of_another_base_is_refused(saved, tmp_path):
    other = save_base(tmp_path / "other", num_hidden_layers=3)
    refuses(RunConfig(base=str(other)), saved, "does not fit")
    wide = save_base(tmp_path / "wide", hidden_size=32)
    refuses(RunConfig(base=str(wide)), saved, "shape")


def test_deltas_are_pefts_own(trained, saved):
    deltas = Deltas.from_folder(saved)
    modules = dict(trained.get_base_model().named_modules())
    assert len(deltas) == 4
    for name, delta in deltas.items():
        expected = modules[name.removesuffix(".weight")].get_delta_weight("default")
        torch.testing.assert_close(delta.dense(), expected, rtol=0, atol=1e-6)


def test_the_scale_of_rank_stabilised_lora_is_understood(saved):
    plain = Deltas.from_folder(saved)
    edit(saved, use_rslora=True)
    stabilised = Deltas.from_folder(saved)
    name = next(iter(plain))
    assert stabilised[name].scale == pytest.approx(plain[name].scale * 2)  # sqrt(rank 4)


def test_an_untrained_adapter_is_an_error(config, tmp_path):
    save_adapter(attach(load_backbone(config), config), tmp_path / "fresh", config, base_name="b")
    with pytest.raises(VerificationError, match="not trained"):
        Deltas.from_folder(tmp_path / "fresh")


def test_a_target_that_no_gradient_reached_is_merged_as_it_was(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path)
    assert [delta.is_zero for delta in Deltas.from_folder(saved).values()].count(True) == 1


def test_a_snapshot_does_not_change_as_training_goes_on(config, tmp_path):
    model = attach(load_backbone(config), config)
    snapshot = AdapterSnapshot.of(model, config, base_name="org/base")
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    stir(model)
    snapshot.write(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(written[name], before[name]) for name in before)
    assert snapshot.size_bytes == sum(tensor.nbytes for tensor in written.values())


def test_a_restored_adapter_is_the_saved_one_and_still_trains(trained, saved, config):
    model = attach(load_backbone(config), config)
    restore_adapter(model, saved)
    theirs = dict(trained.named_parameters())
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            assert torch.equal(weight, theirs[name])
            assert weight.requires_grad


def test_an_adapter_of_other_targets_or_another_rank_is_not_restored(saved, config):
    for changes, words in (({"targets": ("q_proj",)}, "only one of them"), ({"rank": 8}, "shape does not fit")):
        other = config.model_copy(update=changes)
        with pytest.raises(AdapterError, match=words):
            restore_adapter(attach(load_backbone(other), other), saved)


def test_an_adapters_files_have_the_modes_the_umask_asks_for(trained, config, tmp_path):
    import os

    before = os.umask(0o007)
    try:
        save_adapter(trained, tmp_path / "adapter", config, base_name="org/base")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o660}


def test_a_delta_is_zero_when_its_product_is():
    a, b = torch.zeros(2, 5), torch.zeros(4, 2)
    assert Delta(a, b, 2.0).is_zero
    a[0], b[:, 1] = 1.0, 1.0
    assert Delta(a, b, 2.0).is_zero, "B reads what A never writes"
    b[3, 0] = -1e-12
    assert not Delta(a, b, 2.0).is_zero
