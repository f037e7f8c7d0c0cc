"""trackers: the experiment trackers that transformers reports to, and what installs them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lorafit.backbone import redirect_library_logs
from lorafit.errors import UsageError

with redirect_library_logs():  # transformers imports bitsandbytes here, which warns on some CPUs
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}
"""Tracker -> its package, where that has another name."""
EVERY = "all"


def require_trackers(wanted: Iterable[str]) -> None:
    """Raise UsageError for a tracker that transformers does not know, or that is not installed."""
    here = (*get_available_reporting_integrations(), EVERY)
    for name in wanted:
        if name in here:
            continue
        if name in INTEGRATION_TO_CALLBACK:
            fix = f"pip install {PACKAGES.get(name, name)}, or set report_to=none"
            raise UsageError(f"the tracker {name} is not installed", where="report_to", fix=fix)
        near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
        fix = f"choose {near[0] if near else ', '.join(sorted(INTEGRATION_TO_CALLBACK))}, or none"
        raise UsageError(f"'{name:.40}' is no tracker of transformers", where="report_to", fix=fix)
