import json

import pytest

from lorafit.errors import BackboneError
from lorafit.shapes import ModelShape
from planning_shapes import LLAMA_8B, shape


def test_the_8b_llama_has_eight_billion_parameters():
    model = shape()
    assert model.parameters == 8_030_261_248
    assert model.embedding_parameters == model.head_parameters == 128256 * 4096
    assert not model.notes


def test_a_shape_is_read_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert ModelShape.from_base(str(tmp_path)).parameters == shape().parameters


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({}, None),
        (None, None),
    ],
)
def test_a_quantised_checkpoint_is_recognised(settings, name):
    assert shape(quantization_config=settings).quantized == name


def test_a_token_passes_only_its_experts():
    moe = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000}
    model = shape(**moe)
    assert model.parameters == 46_702_792_704
    assert 12.5e9 < model.active_parameters < 13.0e9  # Mixtral 8x7B: "uses only 13B active parameters"
    assert model.expert_parameters > 0.9 * model.parameters


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_config_without_its_sizes_is_one_sentence_naming_the_key(key):
    with pytest.raises(BackboneError, match=key):
        ModelShape.from_config({name: value for name, value in LLAMA_8B.items() if name != key}, "broken")


def test_query_heads_that_cannot_share_their_keys_are_refused_before_training_fails_on_them():
    with pytest.raises(BackboneError, match=r"num_attention_heads = 32 and num_key_value_heads = 5.* a multiple"):
        shape(num_key_value_heads=5)


@pytest.mark.parametrize("value", [-1, 1.5, "4096", True, 1 << 50, [4096]])
def test_a_size_that_is_no_count_is_refused(value):
    with pytest.raises(BackboneError, match="hidden_size"):
        shape(hidden_size=value)


@pytest.mark.parametrize(
    "changes",
    [
        {"is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_what_is_no_causal_language_model_is_refused(changes):
    with pytest.raises(BackboneError):
        shape(**changes)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", "[" * 100_000])
def test_a_broken_config_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(BackboneError, match=r"config\.json"):
        ModelShape.from_base(str(tmp_path))
