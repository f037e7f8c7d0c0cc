"""Whatever config.json holds, the plan reads it or says what is wrong with it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.config import resolve
from lorafit.errors import LorafitError
from lorafit.hardware import hardware_named
from lorafit.planning import make_plan
from lorafit.shapes import ModelShape
from lorafit.shapes.dimensions import KEYS
from lorafit.shapes.families import FAMILIES
from planning_shapes import TINY, facts

NAMES = [
    *sorted({name for names in KEYS.values() for name in names}),
    "quantization_config", "vision_config", "text_config", "architectures", "mlp_only_layers", "moe_layers",
    "expansion_ratio", "tie_word_embeddings", "is_encoder_decoder", "attn_logit_softcapping", "head_dim",
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-5, 1 << 45) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    whole=st.booleans(),
)
def test_any_config_is_planned_for_or_refused_in_one_sentence(family, changes, whole):
    config = {**(TINY if whole else {}), "model_type": family, **changes}
    try:
        make_plan(resolve(), facts(rows=100), ModelShape.from_config(config, "a-base"), hardware_named("T4")).to_dict()
    except LorafitError as error:
        assert "\n" not in str(error)
