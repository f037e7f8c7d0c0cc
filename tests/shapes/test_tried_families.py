"""The table of families is what the package's own rules give, and says so in the terminal."""

import json
import re

import pytest

from families_zoo import small_config
from lorafit.backbone import projections_of
from lorafit.backbone.architecture import skeleton
from lorafit.cli import main
from lorafit.demo import BASE
from lorafit.shapes import resolve_targets
from lorafit.shapes.tried_families import tried_families


@pytest.mark.parametrize(
    "name", ["qwen3_5_text", "gpt_oss", "phi3", "gpt2", "nemotron_h", "stablelm", "mistral3", "qwen2_5_vl"]
)
def test_the_table_names_the_modules_that_the_presets_select(name):
    (row,) = [one for one in tried_families().families if one.name == name]
    projections = projections_of(skeleton(small_config(name)))
    assert set(row.qv) == set(resolve_targets("qv", projections))
    assert set(row.all_linear) == set(resolve_targets("all-linear", projections))
    assert row.works and not row.reason


def test_a_hundred_families_work_at_every_stage():
    assert sum(row.works for row in tried_families().families) >= 100


def test_every_row_that_does_not_work_says_why():
    tried = tried_families()
    assert [one.name for one in tried.families] == sorted({one.name for one in tried.families})
    for one in tried.families:
        assert one.works != bool(one.reason), one.name
        assert not re.match(r"\w+Error:", one.reason), f"{one.name} crashes"


def test_the_command_shows_the_table_and_one_family(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["models", "qwen3_5_text", "--json"])
    assert not ended.value.code
    (shown,) = json.loads(capsys.readouterr().out)["families"]
    assert shown["rows"] == "padded" and shown["works"]
    with pytest.raises(SystemExit) as ended:
        main(["models", "qwen3_5_txt"])
    assert ended.value.code == 2
    assert "did you mean 'qwen3_5_text'" in capsys.readouterr().err


def test_a_hub_id_or_a_base_folder_leads_to_its_family(capsys):
    for named, family in {"Qwen/Qwen3-8B": "qwen3", "google/gemma-3-4b-it": "gemma3", "lama": "llama"}.items():
        with pytest.raises(SystemExit):
            main(["models", named])
        assert f"did you mean '{family}'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["models", str(BASE)])
    assert capsys.readouterr().out.startswith("llama")


def test_the_list_fits_three_screens_and_has_every_family(capsys):
    with pytest.raises(SystemExit):
        main(["models"])
    out = capsys.readouterr().out
    assert out.count("\n") < 72
    assert out.count(", ") > 200 and "rwkv" in out and "its model is an encoder" in out
