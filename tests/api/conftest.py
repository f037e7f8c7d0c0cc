"""What tests of this room share."""

import pytest

from little_run import write_rows
from tiny_models import save_base


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows and a base: what `train` is given."""
    folder = tmp_path_factory.mktemp("made")
    return write_rows(folder / "rows.jsonl"), str(save_base(folder / "base"))
