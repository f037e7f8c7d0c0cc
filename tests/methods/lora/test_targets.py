import pytest
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone.projections import OLD_EXPERTS
from lorafit.config import resolve
from lorafit.errors import AdapterError
from lorafit.methods.lora import attach, resolve_targets
from lorafit.methods.lora.attach import linear_names, matching, unambiguous
from tiny_models import FAMILIES, tiny_config

SPLIT = ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gemma3", "mixtral", "qwen3_moe"]


def model_of(family, **overrides):
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides))


@pytest.mark.parametrize("family", SPLIT)
def test_the_presets_name_the_projections_of_each_family(family):
    model = model_of(family)
    assert resolve_targets(model, "qv") == ("q_proj", "v_proj")
    assert resolve_targets(model, "attention") == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert len(matching(["q_proj"], linear_names(model))) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_but_the_head_and_the_routers(family):
    model = model_of(family)
    names = resolve_targets(model, "all-linear")
    assert matching(names, linear_names(model)) == set(linear_names(model))
    assert not {"lm_head", "embed_out", "gate"} & set(names)


@pytest.mark.parametrize(("family", "fused"), [("phi3", "qkv_proj"), ("gpt_neox", "query_key_value")])
def test_a_preset_selects_the_fused_projection_where_there_is_no_other(family, fused):
    assert resolve_targets(model_of(family), "qv") == (fused,)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_the_head_and_the_embedding_cannot_be_targets(name):
    with pytest.raises(AdapterError, match="not part of the decoder"):
        resolve_targets(model_of("llama"), [name])


def test_dotted_endings_choose_single_layers():
    model = model_of("llama")
    names = resolve_targets(model, ["layers.1.self_attn.q_proj"])
    assert matching(names, linear_names(model)) == {"model.layers.1.self_attn.q_proj"}


def test_a_name_is_matched_whole_and_not_as_a_part():
    with pytest.raises(AdapterError, match="llama has no linear module 'proj'"):
        resolve_targets(model_of("llama"), ["proj"])


def test_a_target_may_be_missing_from_some_layers():
    model = model_of("llama")
    del model.model.layers[1].self_attn.q_proj
    assert resolve_targets(model, "qv") == ("q_proj", "v_proj")
    assert matching(["q_proj"], linear_names(model)) == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_names_that_lorafit_leaves_out_are_those_that_peft_rewrites(family):
    model = model_of(family, **({"mlp_only_layers": [0]} if family == "qwen3_moe" else {}))
    peft = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"])
    convert_peft_config_for_transformers(peft, model, None)
    rewritten = OLD_EXPERTS["mixtral" if family == "mixtral" else "qwen2_moe"]
    assert set(peft.target_modules) == {"q_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"} - rewritten
    assert not rewritten & set(resolve_targets(model, "all-linear"))


@pytest.mark.parametrize("family", ["deepseek_v3", "bamba", "gpt2", "nemotron_h"])
def test_attach_adapts_what_the_preset_selects_and_only_that(family):
    model = AutoModelForCausalLM.from_config(small_config(family))
    config = resolve(flags={"base": "a-base", "targets": "all-linear"}).config
    adapted = attach(model, config)  # asserts that adapters sit on the selected linears alone
    names = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(names) >= 4 and not [name for name in names if "out_proj" in name and "mamba" in name]


@pytest.mark.parametrize(("family", "left_out"), [("deepseek_v4", "o_a_proj"), ("hunyuan_v1_moe", "wg")])
def test_grouped_projections_and_routers_of_any_name_take_no_adapter(family, left_out):
    model = AutoModelForCausalLM.from_config(small_config(family))
    assert any(name.endswith(f".{left_out}") for name in linear_names(model))
    assert left_out not in resolve_targets(model, "all-linear")


def test_a_vision_tower_takes_no_adapter_though_its_projections_have_the_same_names():
    model = model_of("gemma3")
    wanted = matching(["q_proj"], linear_names(model))
    assert len(wanted) == 2 and all("language_model" in name for name in wanted)
    assert set(unambiguous(model, ["q_proj"])) == wanted
    assert unambiguous(model_of("llama"), ["q_proj"]) == ("q_proj",)
