import pytest
from transformers import AutoModelForCausalLM

from lorafit.errors import AdapterError
from lorafit.methods.lora import resolve_targets
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


@pytest.mark.parametrize(("family", "has"), [("phi3", "qkv_proj"), ("gpt_neox", "query_key_value")])
def test_fused_projections_are_an_error_that_lists_the_names_there_are(family, has):
    model = model_of(family)
    with pytest.raises(AdapterError) as caught:
        resolve_targets(model, "qv")
    assert "q_proj" in caught.value.what and has in caught.value.fix
    assert resolve_targets(model, [has]) == (has,)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_the_head_the_embedding_and_norms_cannot_be_targets(name):
    with pytest.raises(AdapterError, match="cannot take an adapter"):
        resolve_targets(model_of("llama"), [name])


def test_dotted_endings_choose_single_layers():
    model = model_of("llama")
    names = resolve_targets(model, ["layers.1.self_attn.q_proj"])
    assert matching(names, linear_names(model)) == {"model.layers.1.self_attn.q_proj"}


def test_a_name_is_matched_whole_and_not_as_a_part():
    with pytest.raises(AdapterError, match="no linear layer named proj"):
        resolve_targets(model_of("llama"), ["proj"])


def test_a_target_that_some_layers_lack_is_an_error():
    model = model_of("llama")
    del model.model.layers[1].self_attn.q_proj
    with pytest.raises(AdapterError, match=r"q_proj is missing from 1 of the layers, such as model\.layers\.1"):
        resolve_targets(model, "qv")


def test_a_family_that_mixes_kinds_of_layers_may_lack_attention_in_some():
    model = model_of("llama")
    del model.model.layers[1].self_attn.q_proj
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert resolve_targets(model, ["q_proj"]) == ("q_proj",)


def test_a_vision_tower_takes_no_adapter_though_its_projections_have_the_same_names():
    model = model_of("gemma3")
    wanted = matching(["q_proj"], linear_names(model))
    assert len(wanted) == 2 and all("language_model" in name for name in wanted)
    assert set(unambiguous(model, ["q_proj"])) == wanted
    assert unambiguous(model_of("llama"), ["q_proj"]) == ("q_proj",)
