from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafit.config import RunConfig, load_recipe, parse_assignments, resolve
from lorafit.config.dial import Dial
from lorafit.errors import UsageError

LAYERS = 32
counts = st.integers(0, LAYERS)
dials = st.builds(
    Dial, counts, counts, counts, st.booleans(), st.one_of(st.none(), st.integers(1, 100_000)), counts
).map(lambda dial: dial.clamped(LAYERS))  # fmt: skip


@given(dials)
def test_what_is_written_is_read_back(dial):
    assert Dial.parse(str(dial), LAYERS) == dial


@given(dials, st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_micro_batch_that_is_said_is_meant_whoever_reads_it(dial, tokens, max_tokens):
    said = dial.sized(tokens, max_tokens)
    assert (said.micro_tokens or max_tokens) == (dial.micro_tokens or tokens)
    assert said.micro_tokens != max_tokens
    assert replace(said, micro_tokens=dial.micro_tokens) == dial


@pytest.mark.parametrize(
    ("text", "dial"),
    [
        ("keep", Dial()),
        ("recompute", Dial(whole=32)),
        ("offload", Dial(offload=32)),
        ("recompute,offload=32", Dial(whole=32, offload=32)),
        (" feed_forward = 20 , offload=32,embeddings=host,micro_tokens=4096", Dial(20, 0, 32, True, 4096)),
        ("feed_forward=99,whole=10,offload=99", Dial(22, 10, 32)),
        ("whole=0", Dial()),
        ("keep,weights=dense", Dial(dense=32)),
        ("dense=17,micro_tokens=8192", Dial(micro_tokens=8192, dense=17)),
        ("dense=99", Dial(dense=32)),
    ],
)
def test_dials_are_read_as_people_write_them(text, dial):
    assert Dial.parse(text, LAYERS) == dial


@pytest.mark.parametrize(
    "text",
    ["", "kept", "feed_forward", "feed_forward=", "feed_forward=-1", "feed_forward=1.5", "offload=all", "whole=1,keep",
     "micro_tokens=0", "embeddings=card", "whole=1,whole=2", "whole=1,,", "layers=3", "whole=1e3", "whole=9999999999",
     "embeddings=host,embeddings=host", "weights=4bit", "weights=dense,dense=3", "whole=²"],
)  # fmt: skip
def test_nonsense_is_a_usage_error_in_one_sentence(text):
    with pytest.raises(UsageError, match=r"^activations: '.*feed_forward=20,offload=32") as caught:
        Dial.parse(text, LAYERS)
    assert "\n" not in str(caught.value)


def test_the_setting_is_judged_before_anything_is_read():
    with pytest.raises(UsageError, match="no setting of the activations"):
        resolve(flags={"activations": "everything"})
    with pytest.raises(UsageError, match="activations is: keep, recompute, offload"):
        resolve(flags={"activations": False})


def test_a_dial_can_be_set_by_flag_and_by_recipe(tmp_path):
    text = "feed_forward=20,offload=32"
    assert resolve(flags=parse_assignments([f"activations={text}"])).config.activations == text
    (tmp_path / "recipe.yaml").write_text(f"activations: {text}\ncompile: off\n")
    config = resolve(load_recipe(tmp_path / "recipe.yaml")).config
    assert (config.activations, config.compile) == (text, "off")
    assert resolve(flags=parse_assignments(["compile=on"])).config.compile == "on"


@pytest.mark.parametrize(
    ("checkpointing", "activations", "agree"),
    [
        ("auto", "feed_forward=3", True),
        ("on", "auto", True),
        ("on", "recompute", True),
        ("on", "whole=32,offload=32", True),
        ("on", "keep", False),
        ("on", "feed_forward=32", False),
        ("reentrant", "offload", False),
        ("off", "keep", True),
        ("off", "offload", True),
        ("off", "whole=1", False),
        ("off", "feed_forward=1", False),
    ],
)
def test_two_wishes_about_activations_must_be_one(checkpointing, activations, agree):
    settings = {"gradient_checkpointing": checkpointing, "activations": activations}
    if agree:
        assert RunConfig(**settings).activations == activations
    else:
        with pytest.raises(UsageError, match="set one of the two"):
            RunConfig(**settings)


@given(dials, st.integers(1, LAYERS), st.integers(1, 3000))
def test_turning_it_tighter_comes_to_an_end_with_everything_away(dial, layers, longest):
    dial, steps = dial.clamped(layers), 0
    while (tighter := dial.tighter(layers, 8192, longest)) is not None:
        assert tighter != dial
        dial, steps = tighter, steps + 1
    assert steps < 40
    assert (dial.whole, dial.feed_forward, dial.offload, dial.host_embeddings) == (layers, 0, layers, True)
    assert dial.micro_tokens is None or longest in (dial.micro_tokens, max(longest, dial.micro_tokens))


def test_the_cheapest_memory_goes_first():
    dial, seen = Dial(), []
    while (dial := dial.tighter(32, 4096, 1500)) is not None:
        seen.append(str(dial))
    assert seen == [
        "feed_forward=8", "feed_forward=16", "feed_forward=24", "feed_forward=32",
        "feed_forward=24,whole=8", "feed_forward=16,whole=16", "feed_forward=8,whole=24", "whole=32",
        "whole=32,offload=32", "whole=32,offload=32,embeddings=host",
        "whole=32,offload=32,embeddings=host,micro_tokens=2048",
        "whole=32,offload=32,embeddings=host,micro_tokens=1500",
    ]  # fmt: skip


def test_unpacked_weights_go_before_anything_is_recomputed_and_by_halves():
    dial, seen = Dial(dense=5), []
    while dial.keeps_everything:
        dial = dial.tighter(32)
        seen.append(str(dial))
    assert seen == ["dense=2", "dense=1", "keep", "feed_forward=8"]


def test_what_is_away_already_is_not_recomputed_for_nothing():
    assert str(Dial(feed_forward=20, offload=28).tighter(32)) == "feed_forward=32,offload=28"
    assert str(Dial(feed_forward=32, offload=28).tighter(32)) == "whole=32,offload=28"


@pytest.mark.parametrize(("layer", "level"), [(0, "whole"), (1, "feed_forward"), (3, "keep")])
def test_the_first_layers_are_recomputed_entirely_the_next_in_part(layer, level):
    assert Dial(feed_forward=2, whole=1).level(layer) == level
