import pytest

from lorafit.errors import AdapterError
from lorafit.shapes import experts_note, targets_note
from lorafit.shapes import resolve_targets as resolve_in
from planning_shapes import GPT2, PHI3, shape

NEOX = {"model_type": "gpt_neox"}


def resolve_targets(targets, model):
    return resolve_in(targets, model.projections, model.family)


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


@pytest.mark.parametrize(
    ("config", "fused"), [(PHI3, "qkv_proj"), (NEOX, "query_key_value"), ({"model_type": "falcon"}, "query_key_value")]
)
def test_a_preset_falls_back_to_the_fused_projection_with_a_note(config, fused):
    model = shape(**config)
    assert resolve_targets("qv", model) == (fused,)
    assert resolve_targets("attention", model)[0] == fused
    assert f"'qv' adapts the whole of {fused}" in targets_note("qv", model.projections, model.family)
    assert not targets_note("all-linear", model.projections, model.family)


def test_what_the_error_advises_is_accepted():
    model = shape(PHI3)
    assert resolve_targets(("qkv_proj", "o_proj"), model) == ("qkv_proj", "o_proj")


def test_names_that_two_modules_share_come_with_their_module():
    assert resolve_targets("qv", shape(GPT2)) == ("c_attn",)
    assert resolve_targets("attention", shape(GPT2)) == ("c_attn", "attn.c_proj")
    assert resolve_targets("all-linear", shape(GPT2)) == ("c_attn", "c_proj", "c_fc")


def test_feed_forwards_that_peft_takes_for_experts_are_left_out_with_a_note():
    model = shape(model_type="qwen3_moe", num_experts=8, moe_intermediate_size=512, mlp_only_layers=[0])
    assert resolve_targets("all-linear", model) == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert "leaves out gate_proj, up_proj, down_proj" in targets_note("all-linear", model.projections, "qwen3_moe")
    assert resolve_targets(("up_proj",), model) == ("up_proj",)
    everything = resolve_targets("all-linear+experts", model)
    assert {"mlp.gate_proj", "mlp.up_proj", "experts.down_proj"} <= {*everything} | {f"mlp.{one}" for one in everything}
    assert not targets_note("all-linear+experts", model.projections, "qwen3_moe")


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


def test_experts_are_targets_when_they_are_named_with_their_module():
    model = shape(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    every = resolve_targets("all-linear+experts", model)
    assert every == (*resolve_targets("all-linear", model), "experts.gate_up_proj", "experts.down_proj")
    assert resolve_targets(("experts.down_proj",), model) == ("experts.down_proj",)
    with pytest.raises(AdapterError, match="has no linear module 'gate_up_proj'"):
        resolve_targets(("gate_up_proj",), model)
    with pytest.raises(AdapterError, match="has no stacked experts"):
        resolve_targets("all-linear+experts", shape())
    note = experts_note(every, model.projections, 16, 2)
    assert note.startswith("adapters on experts have rank 8,")
    assert f"{32 * 8 * 8 * (4096 + 2 * 14336 + 14336 + 4096):,} weights" in note


@pytest.mark.parametrize("family", ["qwen2_moe", "phimoe", "mixtral"])
def test_all_linear_leaves_routers_and_stacked_experts_alone(family):
    names = resolve_targets("all-linear", shape(model_type=family, num_local_experts=8))
    assert not set(names) & {"router", "gate", "shared_expert_gate", "gate_up_proj", "experts", "lm_head"}
    assert {"q_proj", "o_proj"} <= set(names)
