"""Whatever an adapter_config.json says: it is refused in one sentence, or the model is the one that was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafit.backbone import load_backbone
from lorafit.config import RunConfig
from lorafit.errors import AdapterError
from lorafit.methods.lora import attach, load_adapter, save_adapter
from lorafit.methods.lora.adapted_model import LoraConfig
from lorafit.methods.lora.adapter_folder import AdapterFiles
from lorafit.methods.lora.lora import Lora
from tiny_models import save_base, some_ids, stir

# that PEFT would do something about, or would fall over
SAID = [
    ("init_lora_weights", "pissa", "changes the base's weights"),
    ("init_lora_weights", "pissa_niter_4", "changes the base's weights"),
    ("init_lora_weights", "olora", "changes the base's weights"),
    ("init_lora_weights", "loftq", "changes the base's weights"),
    ("init_lora_weights", 1.5, "changes the base's weights"),
    ("lora_dropout", 5, "not a number from 0 to 1"),
    ("lora_dropout", float("nan"), "not a number from 0 to 1"),
    ("lora_dropout", "0.1", "not a number from 0 to 1"),
    ("use_rslora", True, "the adapter has scale 4, but the run was trained with 2"),
    ("use_rslora", "false", "not true or false"),
    ("lora_alpha", 9, "the adapter has scale"),
    ("lora_alpha", "8", "no positive number"),
    ("r", 8, "rank"),
    ("task_type", "SEQ_CLS", "not CAUSAL_LM"),
    ("task_type", ["CAUSAL_LM"], "not CAUSAL_LM"),
    ("use_dora", True, "the adapter is DoRA, but the run was trained with LoRA"),
    ("use_dora", "yes", "not true or false"),
    ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
    ("layers_to_transform", 0, "layers_to_transform"),
    ("lora_alpha", 10**400, "no positive number"),
    ("target_modules", ["q_proj", "v_proj", "lm_head"], "also selects lm_head"),
    ("peft_type", "IA3", "peft_type is 'IA3', which is no LoRA"),
    ("fan_in_fan_out", True, "stores its weight as \\(out, in\\); set fan_in_fan_out to false there"),
    ("bias", "all", "sets bias"),
    ("alpha_pattern", {"q_proj": 8}, "alpha_pattern is set for linear modules"),
]
FREE = (
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "target_parameters", "fan_in_fan_out",
    "modules_to_save", "eva_config",
)  # fmt: skip
"""Keys that an adapter may set; its weights and the run's settings are compared with them."""
NO_MATTER = ("lora_dropout", "base_model_name_or_path", "revision")
VALUES = (None, True, False, 0, 1, -1, 1e300, "", "x", [], ["x"], {}, {"x": 1})


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base") / "llama")
    return RunConfig(base=str(base), dropout=0.0, rank=4, alpha=8.0, quantization="none")


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    model = attach(load_backbone(config), config)
    stir(model)
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, folder, config, base_name="org/base")
    return folder


@pytest.fixture(scope="module")
def answer(saved, config):
    return logits(config, saved)


def logits(config, folder):
    with torch.no_grad():
        return Lora().load(load_backbone(config), folder, config).eval()(some_ids()).logits


@pytest.fixture
def edited(saved, request):
    path = saved / "adapter_config.json"
    text = path.read_text()
    yield lambda key, value: path.write_text(json.dumps(json.loads(text) | {key: value}))
    path.write_text(text)


@pytest.mark.parametrize(("key", "value", "said"), SAID)
def test_settings_that_plain_lora_does_not_have_are_refused(config, saved, edited, key, value, said):
    edited(key, value)
    with pytest.raises(AdapterError, match=said) as caught:
        logits(config, saved)
    assert "\n" not in str(caught.value)


def meant(folder):
    """What PEFT is told of the adapter, without names and dropout, which bear on no answer."""
    settings = AdapterFiles.open(folder).settings().to_dict()
    return {key: settings[key] for key in settings if key not in NO_MATTER}


def test_no_value_of_any_key_gives_another_model_or_a_foreign_error(saved, edited):
    accepted, plain = 0, meant(saved)
    for key in (*LoraConfig().to_dict(), "peft_type", "unknown"):
        for value in VALUES:
            edited(key, value)
            try:
                again = meant(saved)
            except AdapterError as error:
                assert "\n" not in str(error)
                continue
            assert again == plain or key in FREE, f"{key} = {value!r}"
            accepted += 1
    assert accepted > 100, "falsy values of keys that lorafit does not set are harmless"


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
PARTS = (
    "lora_up.weight",
    "alpha",
    "lora_E",
    "ranknum",
    "lora_magnitude_vector",
    "lora_A.default.weight",
    "lora_B.bias",
)
PARTS += ("lora_a.weight", "ia3_l", "vera_lambda_b", "base_layer.bias")
FOREIGN = [f"{MODULE}.{part}" for part in PARTS]
FOREIGN += ["lora_A.weight", "base_model.model.lora_A.weight", f"base_model.model.{MODULE}.lora_A.weight"]
FOREIGN += ["prompt_embeddings", "base_model.model.model.embed_tokens.weight", f"{MODULE}.oft_r"]


@pytest.mark.parametrize("key", FOREIGN)
def test_a_tensor_of_another_method_is_refused(saved, tmp_path, key):
    copy = shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(copy / "adapter_model.safetensors")
    save_file({**tensors, key: torch.ones(4, 64)}, copy / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is no LoRA weight|lacks its A or its B"):
        AdapterFiles.open(copy).weights()


def test_weights_in_8_bit_floats_are_read(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "adapter")
    tensors = load_file(copy / "adapter_model.safetensors")
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(narrow, copy / "adapter_model.safetensors")
    a, _ = AdapterFiles.open(copy).weights()[MODULE.removeprefix("base_model.model.")]
    assert torch.equal(a, narrow[f"{MODULE}.lora_A.weight"].float())


def test_experts_that_the_base_does_not_have_are_refused(config, saved, edited):
    edited("target_parameters", ["x"])
    with pytest.raises(AdapterError, match="the adapter does not fit the base: x is in only one of them"):
        logits(config, saved)


def test_a_checked_adapter_is_loaded_without_peft_reading_its_settings(config, saved, edited, answer):
    edited("megatron_core", "")
    with torch.no_grad():
        assert torch.equal(load_adapter(load_backbone(config), saved).eval()(some_ids()).logits, answer)
