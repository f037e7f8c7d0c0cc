"""Plug-ins: objectives and export formats of installed packages, found by their entry points."""

import sys

import pytest

from lorafit.api.manifest import environment
from lorafit.api.settings import settle
from lorafit.config import resolve
from lorafit.engine import VocabularyLoss
from lorafit.errors import UsageError
from lorafit.export import FORMATS, format_named
from lorafit.objectives import Objective, Sft, objective_of
from lorafit.plugins import OBJECTIVES, load_plugin, plugin_names

MODULE = """
from lorafit.export.formats import Safetensors
from lorafit.objectives import Sft

class Own(Sft):
    name = "own"

class Half:
    def collate(self, rows, indices): ...

class OwnFormat(Safetensors):
    name = "own"
"""


def install(folder, package: str, **names: str) -> None:
    """Write what pip leaves of a package whose objectives are `names`."""
    info = folder / f"{package}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    objectives = "".join(f"{name} = {value}\n" for name, value in names.items())
    formats = f"[lorafit.export_formats]\nown = {package}:OwnFormat\n"
    (info / "entry_points.txt").write_text(f"[{OBJECTIVES}]\n{objectives}{formats}")
    (folder / f"{package}.py").write_text(MODULE)


@pytest.fixture
def package(tmp_path, monkeypatch):
    install(tmp_path, "ownlosses", own="ownlosses:Own", half="ownlosses:Half", lost="ownlosses_lost:Own")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("ownlosses", None)


def test_an_objective_of_a_package_is_chosen_by_its_name_and_its_release_is_kept(package):
    config = settle(None, {"objective": "own"}).config
    assert type(objective_of(config, VocabularyLoss(None))).__name__ == "Own"
    assert environment(config)["objective"] == "ownlosses 1.2"
    assert "objective" not in environment(settle(None, {}).config)
    assert isinstance(objective_of(settle(None, {}).config, VocabularyLoss(None)), Sft)


def test_an_export_format_of_a_package_is_found_beside_the_built_in_ones(package):
    assert format_named("own").name == "own" and "own" not in FORMATS
    with pytest.raises(UsageError, match=r"choose safetensors, .* or own"):
        format_named("owm")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("half", "ownlosses 1.2 lacks weight, loss of lorafit's Objective"),
        ("lost", "ownlosses 1.2 cannot be loaded: ModuleNotFoundError"),
        ("none", "no installed package has the plug-in 'none'"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_one_sentence(package, name, reason):
    with pytest.raises(UsageError, match=reason):
        load_plugin(OBJECTIVES, name, Objective)


def test_two_packages_with_one_name_are_refused(package):
    install(package / "more", "otherlosses", own="otherlosses:Own")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UsageError, match=r"otherlosses 1\.2 and ownlosses 1\.2"):
        patch.syspath_prepend(package / "more")
        load_plugin(OBJECTIVES, "own", Objective)


def test_an_objective_that_is_not_installed_is_refused_and_its_runs_still_open(package):
    with pytest.raises(UsageError, match=r"objective: 'smooth' is neither .* choose sft or half or lost or own"):
        settle(None, {"objective": "smooth"})
    assert plugin_names(OBJECTIVES) == ("half", "lost", "own")
    assert resolve({"objective": "smooth"}).config.objective == "smooth"  # as run.yaml is read
