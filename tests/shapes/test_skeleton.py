"""Families outside of the table, sized by a child process; this process imports no torch for it."""

import json
import subprocess
import sys

import pytest
from transformers import CONFIG_MAPPING

import lorafit
from families_zoo import counted_here, small_config
from lorafit.backbone.architecture import read_architecture
from lorafit.errors import AdapterError, BackboneError
from lorafit.shapes import ModelShape, resolve_targets, skeleton
from planning_shapes import LLAMA_8B
from tiny_models import save_tokenizer

NEMOTRON = {**LLAMA_8B, "model_type": "nemotron", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
GLM_4_5_AIR = {
    "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "vocab_size": 151552, "attention_bias": True, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shapes"


@pytest.fixture
def here(monkeypatch):
    """Have the child's work done in this process, and count how often: a child takes seconds."""
    asked, run = [], counted_here(subprocess.run)

    def counted(command, **options):
        if skeleton.CHILD in command:
            asked.append(command)
        return run(command, **options)

    monkeypatch.setattr(skeleton.subprocess, "run", counted)
    return asked


def test_a_mixture_outside_the_table_has_all_its_experts(here):
    """zai-org/GLM-4.5-Air: 106 B parameters in all, 12 B of them active."""
    shape = ModelShape.from_config(GLM_4_5_AIR, "glm")
    assert 104e9 < shape.parameters < 108e9
    assert 11e9 < shape.active_parameters < 14e9
    assert shape.counted and shape.notes == ("the routers are frozen, and their auxiliary loss is off",)
    assert shape.expert_parameters == 45 * 128 * 3 * 4096 * 1408


def test_a_nested_text_config_is_the_decoder_and_the_tower_is_counted(here):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    model = ModelShape.from_config({"model_type": "gemma3", "text_config": text, "vision_config": vision}, "gemma")
    assert (model.family, model.heads, model.head_dim, model.vocab) == ("gemma3_text", 8, 256, 262208)
    assert 3.8e9 < model.parameters - model.tower_parameters < 3.9e9  # google/gemma-3-4b's language model
    assert 0.40e9 < model.tower_parameters < 0.45e9


def test_the_second_look_starts_no_child_and_says_the_same(here):
    first = ModelShape.from_config(NEMOTRON, "a-base")
    assert ModelShape.from_config(NEMOTRON, "a-base") == first
    assert len(here) == 1
    assert ModelShape.from_config({**NEMOTRON, "vocab_size": 101}, "a-base").vocab == 101
    assert len(here) == 2


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace('"layers": 2', '"layers": 3')])
def test_a_damaged_answer_is_asked_again(damage, cache, here):
    first = ModelShape.from_config(NEMOTRON, "a-base")
    [kept] = cache.glob("*.json")
    whole = kept.read_text()
    kept.write_text(damage(whole))
    assert kept.read_text() != whole
    assert ModelShape.from_config(NEMOTRON, "a-base") == first
    assert kept.read_text() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_else(tmp_path, monkeypatch, here):
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "a-file"))
    assert ModelShape.from_config(NEMOTRON, "a-base").layers == 2


def test_an_unknown_type_is_one_sentence_and_nothing_is_kept(cache, here):
    words = r"^a-base: transformers does not support the model type 'brand_new'; choose"
    with pytest.raises(BackboneError, match=words) as caught:
        ModelShape.from_config({**LLAMA_8B, "model_type": "brand_new"}, "a-base")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*.json"))


def test_a_child_that_dies_is_one_sentence(monkeypatch):
    died = subprocess.CompletedProcess([], -9, stdout="", stderr="first\nKilled by the system")
    monkeypatch.setattr(skeleton.subprocess, "run", lambda *unused, **also: died)
    with pytest.raises(BackboneError, match=r"a-base: transformers cannot build the model \(Killed by the system\)"):
        ModelShape.from_config(NEMOTRON, "a-base")


def test_a_quantised_checkpoint_of_another_family_says_how_it_is_quantised(here):
    assert (
        ModelShape.from_config({**NEMOTRON, "quantization_config": {"quant_method": "gptq"}}, "b").quantized == "gptq"
    )


def test_targets_are_checked_against_the_names_that_the_model_has(here):
    shape = ModelShape.from_config(NEMOTRON, "a-base")
    assert resolve_targets("qv", shape.projections) == ("q_proj", "v_proj")
    with pytest.raises(AdapterError, match="did you mean 'up_proj'"):
        resolve_targets(("up_porj",), shape.projections)


@pytest.mark.slow
def test_planning_imports_no_torch_for_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON))
    code = (
        "import sys; from lorafit.shapes import ModelShape; "
        f"ModelShape.from_base({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def refusal(call, *arguments):
    with pytest.raises(BackboneError) as refused:
        call(*arguments)
    return refused.value.what, refused.value.fix


@pytest.mark.parametrize("kind", ["clip", "pix2struct", "vision-encoder-decoder", "florence2", "RefinedWeb", "smollm"])
def test_planning_refuses_with_the_sentence_of_training(kind, tmp_path, here):
    """The last two are older names that transformers does not know."""
    config = small_config(kind).to_dict() if kind in CONFIG_MAPPING else {**LLAMA_8B, "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(ModelShape.from_base, str(tmp_path)) == refusal(read_architecture, tmp_path)


def test_a_model_that_needs_an_image_with_every_row_is_refused(tmp_path, here):
    small_config("instructblip").save_pretrained(tmp_path)
    what, _ = refusal(ModelShape.from_base, str(tmp_path))
    assert "needs pixel_values" in what and what.endswith("with every row, and lorafit trains on text")


def test_plan_and_check_refuse_a_base_that_training_cannot_load(tmp_path, here):
    small_config("clip").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 4)
    what, _ = refusal(lambda: lorafit.plan(tmp_path / "rows.jsonl", base=tmp_path / "base"))
    assert what == "transformers loads no causal language model from a base of type 'clip'"
    checked = lorafit.check(tmp_path / "rows.jsonl", base=tmp_path / "base")
    assert not checked.ok and what in [finding.message for finding in checked.findings]


@pytest.mark.parametrize(
    ("family", "packs"), [("deepseek_v32", False), ("dots3_note_text", False), ("minimax_m3_vl", True)]
)
def test_a_family_that_picks_keys_from_a_mask_is_not_planned_as_packed(here, family, packs):
    reason = ModelShape.from_config(small_config(family).to_dict(), family).unpacked
    assert not reason if packs else "picks its keys from a mask" in reason
