"""The defects of the classic QLoRA code, one test each. See docs/guides/train.md."""

import warnings

import numpy as np
import pytest
import torch

from little_run import settings
from lorafit import AdapterTrainingPipeline
from lorafit.demo import BASE, TASKS
from lorafit.demo.tasks import rows
from lorafit.engine import packed, supervised_logits
from lorafit.training import StepDataset, training_arguments
from tiny_models import save_base

RAW = rows(TASKS["dates"], 0, 24)


@pytest.fixture(scope="module")
def front():
    return AdapterTrainingPipeline(str(BASE), adapter_rank=4, scaling_factor=8, examples_per_step=8, max_length=256)


@pytest.fixture(scope="module")
def tokenized(front):
    return front.tokenize_dataset(front.format_instruction_data(RAW))


@pytest.fixture(scope="module")
def trainer(front, tokenized, tmp_path_factory):
    model = front.inject_adapters(front.load_frozen_backbone())
    return front.build_trainer(model, tokenized, output_dir=tmp_path_factory.mktemp("run"))


def first_step(trainer):
    return trainer.loop.steps[0]


def test_there_are_labels_so_there_is_a_loss_and_a_gradient(trainer):
    with packed(trainer.model):
        loss = trainer.loop.forward_backward(first_step(trainer))
    assert float(loss) > 0
    gradients = [weight.grad for weight in trainer.model.parameters() if weight.requires_grad]
    assert any(float(gradient.abs().sum()) > 0 for gradient in gradients)
    trainer.model.zero_grad()


def test_prompt_tokens_are_not_in_the_loss(trainer):
    """Another prompt token at a position whose successor is prompt moves no target."""
    batch = first_step(trainer).micro_batches[0]
    supervised = set((batch.predictors + 1).tolist())
    prompt = [place for place in range(batch.tokens) if place not in supervised]
    assert len(prompt) > len(supervised) / 2
    tokenizer = trainer_tokenizer()
    taught = tokenizer.decode(batch.targets.tolist(), skip_special_tokens=False)
    assert "Rewrite the date" not in taught
    assert "<|assistant|>" not in taught


def trainer_tokenizer():
    from lorafit.data import TextTokenizer

    return TextTokenizer.from_base(str(BASE))


def test_every_response_ends_in_a_supervised_stop_token(trainer):
    tokenizer = trainer_tokenizer()
    step = first_step(trainer)
    stops = sum(int((batch.targets == tokenizer.eos_id).sum()) for batch in step.micro_batches)
    assert stops == len(step.rows)


def test_no_row_is_padded_to_anything(trainer):
    step = first_step(trainer)
    assert sum(batch.tokens for batch in step.micro_batches) == step.tokens
    assert step.tokens == int(trainer.loop.train_rows.lengths[list(step.rows)].sum())


def test_every_row_starts_at_position_zero(trainer):
    for batch in first_step(trainer).micro_batches:
        starts = batch.segments.cu_seqlens[:-1].long()
        assert (batch.positions[0, starts] == 0).all()
        assert int((batch.positions == 0).sum()) == len(starts)


def test_a_pad_token_that_is_the_stop_token_still_teaches_to_stop(tmp_path):
    """Masking by id would lose the stop token; masking by position keeps it."""
    import json

    base = save_base(tmp_path / "base")
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|eos|>"}))
    front = AdapterTrainingPipeline(str(base))
    assert front.template.tokenizer.pad_token == front.template.tokenizer.eos_token
    dataset = front.tokenize_dataset(front.format_instruction_data(RAW))
    assert all(row["labels"][-1] == front.template.tokenizer.eos_id for row in dataset)


def test_tokenised_rows_are_lists_of_their_own_length_not_batched_tensors(tokenized):
    lengths = {len(row["input_ids"]) for row in tokenized}
    assert len(lengths) > 1
    assert all(isinstance(row["input_ids"], list) and isinstance(row["input_ids"][0], int) for row in tokenized)


def test_the_trainers_arguments_exist_under_their_names_of_today(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_arguments(settings(memory_policy="recompute"), tmp_path, 10, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_a_machine_without_cuda_trains_in_fp32_with_plain_adamw(trainer):
    assert trainer.args.optim == "adamw_torch_fused"
    assert not trainer.args.fp16
    assert not trainer.args.bf16
    batch = first_step(trainer).micro_batches[0]
    with torch.no_grad(), packed(trainer.model):
        assert supervised_logits(trainer.model, batch).dtype == torch.float32


def test_a_step_counts_the_supervised_tokens_it_really_has(trainer):
    dataset = StepDataset(trainer.loop.train_rows, trainer.loop.config)
    for step in dataset:
        assert step.supervised == sum(batch.supervised for batch in step.micro_batches)
        assert step.supervised == int(np.sum([trainer.loop.train_rows.mask(row).sum() for row in step.rows]))
