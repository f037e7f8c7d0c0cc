import pytest

from lorafit.errors import AdapterError
from lorafit.shapes import resolve_targets
from planning_shapes import GPT2, PHI3, shape

NEOX = {"model_type": "gpt_neox"}
LLAMA_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("qv", ("q_proj", "v_proj")),
        ("attention", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("all-linear", LLAMA_NAMES),
        (("down_proj", "q_proj", "q_proj"), ("down_proj", "q_proj")),
        ("o_proj", ("o_proj",)),
        (("self_attn.q_proj",), ("self_attn.q_proj",)),
    ],
)
def test_targets_resolve_to_the_names_of_a_llama(targets, names):
    assert resolve_targets(targets, shape()) == names


@pytest.mark.parametrize(
    ("family", "names"),
    [("phi", ("q_proj", "k_proj", "v_proj", "dense")), ("opt", ("q_proj", "k_proj", "v_proj", "out_proj"))],
)
def test_attention_is_found_by_what_a_projection_does_not_by_its_name(family, names):
    assert resolve_targets("attention", shape(model_type=family)) == names


@pytest.mark.parametrize("preset", ["qv", "attention"])
@pytest.mark.parametrize(
    ("config", "fused"), [(PHI3, "qkv_proj"), (NEOX, "query_key_value"), ({"model_type": "falcon"}, "query_key_value")]
)
def test_fused_projections_are_an_error_with_the_names_and_what_to_write(config, fused, preset):
    with pytest.raises(AdapterError) as caught:
        resolve_targets(preset, shape(**config))
    message = str(caught.value)
    assert f"'{preset}' needs separate attention projections" in message
    assert f"write targets: [{fused}, " in message
    for name in shape(**config).module_names:
        assert name in message


def test_what_the_error_advises_is_accepted():
    model = shape(PHI3)
    assert resolve_targets(("qkv_proj", "o_proj"), model) == ("qkv_proj", "o_proj")


def test_gpt2_names_its_fused_projection():
    with pytest.raises(AdapterError, match="c_attn"):
        resolve_targets("qv", shape(GPT2))


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("q_proj", "lm_head")])
def test_the_head_and_the_embeddings_take_no_adapter(targets):
    with pytest.raises(AdapterError, match="not part of the decoder"):
        resolve_targets(targets, shape())


def test_a_wrong_name_is_an_error_with_the_nearest_one():
    with pytest.raises(AdapterError, match="did you mean 'q_proj'"):
        resolve_targets(("q_prj",), shape())


def test_no_name_at_all_is_an_error():
    with pytest.raises(AdapterError, match="targets is empty"):
        resolve_targets((), shape())


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe", "mixtral"])
def test_all_linear_leaves_routers_and_stacked_experts_alone(family):
    names = resolve_targets("all-linear", shape(model_type=family, num_local_experts=8))
    assert not set(names) & {"router", "gate", "shared_expert_gate", "gate_up_proj", "experts", "lm_head"}
    assert {"q_proj", "o_proj"} <= set(names)
