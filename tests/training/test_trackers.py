"""A tracker that is not here: known ones say what installs them, others are never something to install."""

import pytest

from lorafit.errors import UsageError
from lorafit.training import require_trackers, transformers_parts


@pytest.fixture(autouse=True)
def only_tensorboard(monkeypatch):
    monkeypatch.setattr(transformers_parts, "get_available_reporting_integrations", lambda: ["tensorboard"])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("wandb",), "the tracker wandb is not installed; pip install wandb, or set report_to=none"),
        (("tensorboard", "flyte"), "pip install flytekit"),
        (("wandbb",), "'wandbb' is no tracker of transformers; choose wandb, or none"),
        (("x",), "choose azure_ml, "),
    ],
)
def test_an_absent_tracker_says_what_to_do(wanted, words):
    with pytest.raises(UsageError, match=words):
        require_trackers(wanted)


def test_what_is_installed_is_taken():
    require_trackers(("tensorboard", "all"))
    require_trackers(())
