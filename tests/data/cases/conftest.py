"""What the cases share: a template of every shape, made once."""

import pytest

from lorafit.data import Template
from template_shapes import SHAPES, template_of


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Template]:
    """The template of each shape, over a small tokenizer."""
    home = tmp_path_factory.mktemp("shapes")
    return {shape: template_of(home, shape) for shape in SHAPES}
