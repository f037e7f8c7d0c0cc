from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config import RunConfig, load_recipe, parse_assignments, resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.errors import UsageError

LAYERS = 32
counts = st.integers(0, LAYERS)
policies = st.builds(
    MemoryPolicy, counts, counts, counts, st.booleans(), st.one_of(st.none(), st.integers(1, 100_000)), counts
).map(lambda policy: policy.clamped(LAYERS))  # fmt: skip


@given(policies)
def test_what_is_written_is_read_back(policy):
    assert MemoryPolicy.parse(str(policy), LAYERS) == policy


@given(policies, st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_micro_batch_that_is_said_is_meant_whoever_reads_it(policy, tokens, max_length):
    said = policy.sized(tokens, max_length)
    assert (said.micro_tokens or max_length) == (policy.micro_tokens or tokens)
    assert said.micro_tokens != max_length
    assert replace(said, micro_tokens=policy.micro_tokens) == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("keep", MemoryPolicy()),
        ("recompute", MemoryPolicy(recompute_layers=32)),
        ("offload", MemoryPolicy(offloaded_layers=32)),
        ("recompute,offloaded_layers=32", MemoryPolicy(recompute_layers=32, offloaded_layers=32)),
        (
            " feed_forward = 20 , offloaded_layers=32,host_embeddings=on,micro_tokens=4096",
            MemoryPolicy(20, 0, 32, True, 4096),
        ),
        ("recompute_mlp_layers=99,recompute_layers=10,offloaded_layers=99", MemoryPolicy(22, 10, 32)),
        ("recompute_layers=0", MemoryPolicy()),
        ("keep,weights=dense", MemoryPolicy(dequantized_layers=32)),
        ("dequantized_layers=17,micro_tokens=8192", MemoryPolicy(micro_tokens=8192, dequantized_layers=17)),
        ("dequantized_layers=99", MemoryPolicy(dequantized_layers=32)),
    ],
)
def test_policies_are_read_as_people_write_them(text, policy):
    assert MemoryPolicy.parse(text, LAYERS) == policy


@pytest.mark.parametrize(
    "text",
    [
        "", "kept", "feed_forward", "recompute_mlp_layers=", "recompute_mlp_layers=-1", "recompute_mlp_layers=1.5",
        "offloaded_layers=all", "recompute_layers=1,keep", "micro_tokens=0", "embeddings=GPU",
        "recompute_layers=1,recompute_layers=2", "recompute_layers=1,,", "layers=3", "recompute_layers=1e3",
        "recompute_layers=9999999999", "host_embeddings=on,host_embeddings=on", "weights=4bit",
        "weights=dense,dequantized_layers=3", "recompute_layers=²",
    ],
)  # fmt: skip
def test_nonsense_is_a_usage_error_in_one_sentence(text):
    with pytest.raises(UsageError, match=r"^memory_policy: '.*recompute_mlp_layers=20,offloaded_layers=32") as caught:
        MemoryPolicy.parse(text, LAYERS)
    assert "\n" not in str(caught.value)


def test_the_setting_is_judged_before_anything_is_read():
    with pytest.raises(UsageError, match="is not a memory policy"):
        resolve(flags={"memory_policy": "everything"})
    with pytest.raises(UsageError, match="memory_policy is: keep, recompute, offload"):
        resolve(flags={"memory_policy": False})


def test_a_policy_can_be_set_by_flag_and_by_recipe(tmp_path):
    text = "recompute_mlp_layers=20,offloaded_layers=32"
    assert resolve(flags=parse_assignments([f"memory_policy={text}"])).config.memory_policy == text
    (tmp_path / "recipe.yaml").write_text(f"memory_policy: {text}\ncompile: off\n")
    config = resolve(load_recipe(tmp_path / "recipe.yaml")).config
    assert (config.memory_policy, config.compile) == (text, "off")
    assert resolve(flags=parse_assignments(["compile=on"])).config.compile == "on"


@pytest.mark.parametrize(
    ("checkpointing", "activations", "agree"),
    [
        ("auto", "recompute_mlp_layers=3", True),
        ("on", "auto", True),
        ("on", "recompute", True),
        ("on", "recompute_layers=32,offloaded_layers=32", True),
        ("on", "keep", False),
        ("on", "recompute_mlp_layers=32", False),
        ("reentrant", "offload", False),
        ("off", "keep", True),
        ("off", "offload", True),
        ("off", "recompute_layers=1", False),
        ("off", "recompute_mlp_layers=1", False),
    ],
)
def test_two_wishes_about_activations_must_be_one(checkpointing, activations, agree):
    settings = {"gradient_checkpointing": checkpointing, "memory_policy": activations}
    if agree:
        wanted = "recompute" if activations == "auto" else activations
        assert RunConfig(**settings).memory_policy == wanted
    else:
        with pytest.raises(UsageError, match="and memory_policy to"):
            RunConfig(**settings)


@given(policies, st.integers(1, LAYERS), st.integers(1, 3000))
def test_turning_it_tighter_comes_to_an_end_with_everything_away(policy, layers, longest):
    policy, steps = policy.clamped(layers), 0
    while (tighter := policy.next_smaller(layers, 8192, longest)) is not None:
        assert tighter != policy
        policy, steps = tighter, steps + 1
    assert steps < 40
    assert (policy.recompute_layers, policy.recompute_mlp_layers, policy.offloaded_layers, policy.host_embeddings) == (
        layers,
        0,
        layers,
        True,
    )
    assert policy.micro_tokens is None or longest in (policy.micro_tokens, max(longest, policy.micro_tokens))


def test_the_cheapest_memory_goes_first():
    policy, seen = MemoryPolicy(), []
    while (policy := policy.next_smaller(32, 4096, 1500)) is not None:
        seen.append(str(policy))
    assert seen == [
        "recompute_mlp_layers=8", "recompute_mlp_layers=16", "recompute_mlp_layers=24", "recompute_mlp_layers=32",
        "recompute_mlp_layers=24,recompute_layers=8", "recompute_mlp_layers=16,recompute_layers=16",
        "recompute_mlp_layers=8,recompute_layers=24", "recompute_layers=32",
        "recompute_layers=32,offloaded_layers=32", "recompute_layers=32,offloaded_layers=32,host_embeddings=on",
        "recompute_layers=32,offloaded_layers=32,host_embeddings=on,micro_tokens=2048",
        "recompute_layers=32,offloaded_layers=32,host_embeddings=on,micro_tokens=1500",
    ]  # fmt: skip


def test_unpacked_weights_go_before_anything_is_recomputed_and_by_halves():
    policy, seen = MemoryPolicy(dequantized_layers=5), []
    while policy.keeps_everything:
        policy = policy.next_smaller(32)
        seen.append(str(policy))
    assert seen == ["dequantized_layers=2", "dequantized_layers=1", "keep", "recompute_mlp_layers=8"]


def test_what_is_away_already_is_not_recomputed_for_nothing():
    assert (
        str(MemoryPolicy(recompute_mlp_layers=20, offloaded_layers=28).next_smaller(32))
        == "recompute_mlp_layers=32,offloaded_layers=28"
    )
    assert (
        str(MemoryPolicy(recompute_mlp_layers=32, offloaded_layers=28).next_smaller(32))
        == "recompute_layers=32,offloaded_layers=28"
    )


@pytest.mark.parametrize(("layer", "level"), [(0, "whole"), (1, "feed_forward"), (3, "keep")])
def test_the_first_layers_are_recomputed_entirely_the_next_in_part(layer, level):
    assert MemoryPolicy(recompute_mlp_layers=2, recompute_layers=1).level(layer) == level


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "recompute_layers=8,recompute_mlp_layers=4,offloaded_layers=12",
            "recompute_mlp_layers=4,recompute_layers=8,offloaded_layers=12",
        ),
        ("keep,dequantized_layers=16,cuda_graph_max_tokens=2048", "dequantized_layers=16,cuda_graph_max_tokens=2048"),
        ("host_embeddings=on", "host_embeddings=on"),
        ("weights=dense", f"dequantized_layers={LAYERS}"),
        ("dequantized_layers=all", f"dequantized_layers={LAYERS}"),
    ],
)
def test_shorter_words_are_read_and_the_field_names_are_written(old, new):
    assert str(MemoryPolicy.parse(old, LAYERS)) == new


def test_one_field_under_two_names_is_said_twice():
    with pytest.raises(UsageError, match="twice"):
        MemoryPolicy.parse("recompute_layers=1,recompute_layers=2", LAYERS)
