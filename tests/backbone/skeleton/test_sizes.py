"""Sizes read from transformers' modules: the same as the table's for its families, and exact for others."""

import json
from collections import Counter

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from families_zoo import small_config
from lorafit.backbone.skeleton.sizes import main, sizes_of
from lorafit.errors import BackboneError
from lorafit.shapes import ModelShape
from lorafit.shapes.families import FAMILIES

SMALL = {
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "intermediate_size_mlp": 112,
}  # fmt: skip
OTHERS = ["glm4_moe", "deepseek_v3", "nemotron", "lfm2", "qwen3_next", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense"]
IN_THE_TABLE = ["llama", "gpt2", "gpt_neox", "opt", "gemma2", "phi3", "qwen3_moe", "gpt_oss", "mixtral"]
ONE_KEY_A_HEAD = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
SIZES = {
    "deepseek_v3": ONE_KEY_A_HEAD | {"num_key_value_heads": 6},
    "gpt_neox": ONE_KEY_A_HEAD,
    "opt": ONE_KEY_A_HEAD | {"ffn_dim": 160, "word_embed_proj_dim": 96, "max_position_embeddings": 32},
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 128, "n_positions": 32},
}


def config_of(family, **changes):
    return CONFIG_MAPPING[family](**{**SIZES.get(family, SMALL), **changes})


def sizes(config, folder):
    config.save_pretrained(folder)
    return sizes_of(folder)


def parameters(found):
    matrices = sum(part["inputs"] * part["outputs"] * part["count"] for part in found["projections"])
    parts = ("embedding_parameters", "head_parameters", "norm_parameters", "tower_parameters")
    return matrices + sum(found[key] for key in parts)


def skeleton_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", OTHERS)
def test_every_parameter_and_linear_of_a_family_outside_the_table_is_counted_once(family, tmp_path):
    config = config_of(family)
    found, model = sizes(config, tmp_path), skeleton_of(config)
    assert family not in FAMILIES
    assert parameters(found) == sum(weight.numel() for weight in model.parameters())
    linears = Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            linears[name.rpartition(".")[2], module.in_features, module.out_features] += 1
    ours = Counter()
    for part in found["projections"]:
        if not part["stacked"]:
            ours[part["name"], part["inputs"], part["outputs"]] += part["count"]
    assert ours == linears


@pytest.mark.parametrize("family", IN_THE_TABLE)
def test_of_a_family_in_the_table_the_sizes_are_the_table_s(family, tmp_path):
    config = config_of(family)
    found, shape = sizes(config, tmp_path), ModelShape.from_config(config.to_dict(), family)
    ours, theirs = Counter(), Counter()
    for part in found["projections"]:
        ours[part["path"], part["role"], part["inputs"], part["outputs"], part["stacked"], part["active"]] += part[
            "count"
        ]
    for part in shape.projections:
        theirs[part.path, part.role, part.inputs, part.outputs, part.stacked, part.active] += part.count
    assert ours == theirs
    for key in ("embedding_parameters", "head_parameters", "norm_parameters", "tied_embeddings", "capped_scores"):
        assert found[key] == getattr(shape, key), key
    for key in ("learned_positions", "linear_class", "normed_width", "layers", "heads", "kv_heads"):
        assert found[key] == getattr(shape, key), key
    assert found["letters"] == {**found["letters"], "h": shape.hidden, "d": shape.head_dim, "v": shape.vocab}


def test_a_vision_tower_is_counted_beside_the_decoder(tmp_path):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](text_config=SMALL, vision_config={**tower, "image_size": 32, "patch_size": 8})
    found, model = sizes(config, tmp_path), skeleton_of(config)
    assert found["tower_parameters"] > 0
    assert parameters(found) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "brand_new"}, "transformers does not support the model type 'brand_new'"),
        ({"model_type": "brand_new", "auto_map": {}}, "needs Python code from its checkpoint"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"model_type": "prophetnet", "is_encoder_decoder": False}, "predicts several tokens at once"),
        ({"model_type": "nemotron", "hidden_size": "wide"}, "not valid"),
    ],
)
def test_a_model_that_cannot_be_built_is_one_sentence_in_the_answer(config, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    main(str(tmp_path))
    answer = json.loads(capsys.readouterr().out)
    assert words in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("kosmos-2", {}, "pixel_values"),  # fails where images are missing
    ("qwen3_vl", {}, ""),
    ("qwen2_5_vl", {"mrope_section": [1, 2, 3]}, "sizes"),  # a share of the dimensions for each axis
    ("deepseek_v3", {"head_dim": 24}, "broadcast"),
])  # fmt: skip
def test_what_the_forward_refuses_in_training_is_refused_before_it(family, changes, said, tmp_path):
    config = small_config(family).to_dict()
    text = config.get("text_config", config)
    text |= {key: value for key, value in changes.items() if key != "mrope_section"}
    if "mrope_section" in changes:
        text["rope_parameters"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not said:
        assert sizes_of(tmp_path)["layers"]
        return
    with pytest.raises(BackboneError, match=rf"the base's forward fails on a row of text \(.*{said}"):
        sizes_of(tmp_path)
