import pytest

from lorafit.config import RunConfig
from lorafit.errors import UsageError
from lorafit.planning.dial import Dial, dial_of


@pytest.mark.parametrize(
    ("settings", "dial"),
    [
        ({}, None),
        ({"gradient_checkpointing": "on"}, Dial(whole=32)),
        ({"gradient_checkpointing": "reentrant"}, Dial(whole=32)),
        ({"gradient_checkpointing": "off"}, Dial()),
        ({"activations": "recompute"}, Dial(whole=32)),
        ({"activations": "offload", "gradient_checkpointing": "off"}, Dial(offload=32)),
        ({"activations": "whole=99,offload=99", "gradient_checkpointing": "on"}, Dial(whole=32, offload=32)),
    ],
)
def test_a_config_asks_for_one_dial_or_leaves_it_to_the_plan(settings, dial):
    assert dial_of(RunConfig(**settings), 32) == dial


def test_checkpointing_on_means_every_layer():
    with pytest.raises(UsageError, match="set one of the two"):
        dial_of(RunConfig(gradient_checkpointing="on", activations="whole=8"), 32)
