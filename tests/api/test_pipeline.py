"""The Python front of the classic steps, with transformers' own objects in between."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, Trainer, pipeline

from lorafit import ADAPTER_CONFIG, QUANT_PROFILE, TRAINING_HYPERPARAMS, AdapterTrainingPipeline, RunConfig
from lorafit.demo import BASE, TASKS
from lorafit.demo.tasks import rows
from lorafit.errors import DataError
from lorafit.objectives import OBJECTIVES, Sft

RAW = rows(TASKS["tickets"], 0, 40)


@pytest.fixture(scope="module")
def front():
    return AdapterTrainingPipeline(str(BASE), adapter_rank=8, scaling_factor=16)


def test_the_profiles_are_the_libraries_own_objects():
    assert isinstance(QUANT_PROFILE, BitsAndBytesConfig)
    assert (QUANT_PROFILE.bnb_4bit_quant_type, QUANT_PROFILE.bnb_4bit_use_double_quant) == ("nf4", True)
    assert isinstance(ADAPTER_CONFIG, LoraConfig)
    assert (ADAPTER_CONFIG.r, ADAPTER_CONFIG.lora_alpha, ADAPTER_CONFIG.lora_dropout) == (16, 32, 0.05)
    assert set(ADAPTER_CONFIG.target_modules) == {"q_proj", "v_proj"}
    assert RunConfig(**TRAINING_HYPERPARAMS).lr == 2e-4


def test_labels_are_the_response_and_its_stop_token_and_nothing_else(front):
    dataset = front.tokenize_dataset(front.format_instruction_data(RAW))
    assert set(dataset.column_names) >= {"input_ids", "attention_mask", "labels"}
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    for raw, row in zip(RAW, dataset):
        taught = [token for token in row["labels"] if token != -100]
        assert taught[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(taught[:-1]) == raw["response"]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
        assert len(row["attention_mask"]) == len(row["input_ids"]), "nothing is padded"


def test_long_rows_are_never_cut(front):
    dataset = front.format_instruction_data([*RAW, {"instruction": "Say it.", "response": "very " * 400}])
    with pytest.raises(DataError, match="1 rows are longer than 128"):
        front.tokenize_dataset(dataset, max_length=128)
    with pytest.warns(UserWarning, match="left out"):
        assert len(front.tokenize_dataset(dataset, max_length=128, on_long="drop")) == len(RAW)


def test_the_objective_is_the_one_that_the_settings_name(front, tmp_path, monkeypatch):
    class Noted(Sft):
        """A registered objective of its own."""

    monkeypatch.setitem(OBJECTIVES, "sft", Noted)
    model = front.inject_adapters(front.load_frozen_backbone())
    rows_of = front.tokenize_dataset(front.format_instruction_data(RAW[:4]))
    assert isinstance(front.build_trainer(model, rows_of, output_dir=tmp_path).loop.steps.objective, Noted)


def test_the_classic_steps_train_merge_and_serve(front, tmp_path, capsys):
    model = front.inject_adapters(front.load_frozen_backbone())
    assert "trainable params: 32,768" in capsys.readouterr().out
    train_ds = front.tokenize_dataset(front.format_instruction_data(RAW))
    trainer = front.build_trainer(model, train_ds, train_ds.select(range(8)), tmp_path, epochs=2, lr=5e-3)
    assert isinstance(trainer, Trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    ids = torch.tensor([train_ds[0]["input_ids"]])
    model.eval()
    from lorafit.engine import unpacked

    with unpacked(model), torch.no_grad():
        live = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        after = merged(input_ids=ids).logits
    assert float((after - live).norm() / live.norm()) < 1e-4, "merging lost what was learnt"
    merged.save_pretrained(tmp_path / "served")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "served")
    made = pipeline("text-generation", model=str(tmp_path / "served"))("Route", max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"].startswith("Route")


@pytest.mark.parametrize(("asked", "recomputes"), [("recompute", True), ("keep", False)])
def test_activations_are_recomputed_only_where_asked_and_never_reentrant(front, asked, recomputes):
    from lorafit.api.pipeline import _recompute_if_asked

    class Model:
        kwargs = None

        def activation_checkpointing_enable(self, kwargs):
            self.kwargs = kwargs

    model = Model()
    _recompute_if_asked(model, front.config.model_copy(update={"memory_policy": asked}))
    assert model.kwargs == ({"use_reentrant": False} if recomputes else None)


def test_its_attributes_are_those_of_the_document(front, tmp_path):
    front.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == front.template.jinja_for_export
    assert front.quantization_config.bnb_4bit_quant_type == "nf4"
    assert front.lora_config.r == front.adapter_rank and front.lora_config.lora_alpha == front.scaling_factor
    assert front.lora_config.target_modules == {"q_proj", "v_proj"} and front.base_model_id == str(BASE)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "has no rows"), ([{"input_ids": [5, 99_999], "labels": [-100, 99_999]}], "token id 99999 has no row")],
)
def test_a_data_set_that_cannot_be_trained_is_an_error_of_ours(front, rows, words):
    columns = {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
    model = front.inject_adapters(front.load_frozen_backbone())
    with pytest.raises(DataError, match=words):
        front.build_trainer(model, Dataset.from_dict(columns))
