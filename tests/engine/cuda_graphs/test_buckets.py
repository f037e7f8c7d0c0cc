"""Buckets: micro-batches of similar size get one size, and what fills them up changes neither loss nor gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from little_run import settings
from lorafit.adapters import attach
from lorafit.backbone import load_backbone
from lorafit.engine import Segments, collate, packed, summed_loss
from lorafit.engine.cuda_graphs import Bucket
from lorafit.engine.loss.vocabulary import IGNORED
from tiny_models import save_base, stir

LAYOUTS = ((5, 9, 17), (8, 3, 2, 4), (33,), (100, 60, 7), (1,))


def batch_of(lengths, seed=0, supervised=0.5):
    random = np.random.default_rng(seed)
    return collate(
        [(random.integers(4, 250, length), np.arange(length) >= (1 - supervised) * length) for length in lengths]
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("llama"))
    config = settings(base=str(base), targets="all-linear", rank=4)
    made = attach(load_backbone(config), config)
    stir(made)
    return made.train()


def filled(batch, longest):
    """`batch` as it comes out of its bucket; its rows grouped, as a CPU's attention needs them."""
    bucket = Bucket.of(batch, 1024, longest)
    found = bucket.batch_of(bucket.filled(batch))
    lengths = np.diff(found.segments.cu_seqlens.numpy())
    assert lengths.sum() == found.tokens and lengths.max() <= bucket.longest
    return replace(found, segments=Segments.of_lengths(lengths[lengths > 0].tolist()))


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_what_fills_a_micro_batch_up_adds_nothing_to_loss_and_gradient(model, lengths):
    def outcome(batch):
        model.zero_grad()
        with packed(model):
            loss = summed_loss(model, batch)
            loss.backward()
        return loss.detach(), torch.cat(
            [weight.grad.flatten() for weight in model.parameters() if weight.requires_grad]
        )

    plain = batch_of(lengths)
    fuller = filled(plain, longest=max(lengths))
    assert fuller.tokens > plain.tokens and fuller.supervised > plain.supervised
    for got, wanted in zip(outcome(fuller), outcome(plain), strict=True):
        assert float((got - wanted).norm()) <= 1e-5 * float(wanted.norm())


@pytest.mark.parametrize("lengths", LAYOUTS)
def test_what_was_there_stays_as_it_is_and_first(lengths):
    plain, fuller = batch_of(lengths), filled(batch_of(lengths), longest=128)
    assert torch.equal(fuller.ids[:, : plain.tokens], plain.ids)
    assert torch.equal(fuller.positions[:, : plain.tokens], plain.positions)
    assert torch.equal(fuller.predictors[: plain.supervised], plain.predictors)
    assert torch.equal(fuller.targets[: plain.supervised], plain.targets)
    assert set(fuller.targets[plain.supervised :].tolist()) <= {IGNORED}


@pytest.mark.parametrize("most", [500, 1024, 6000])
def test_filler_is_less_than_a_sixteenth_of_the_largest_and_sizes_are_few(most):
    step = max(64, most // 16 + 64)
    seen = set()
    for tokens in range(1, most + 1, 7):
        rows = [1] * (tokens % 5) + [max(tokens - tokens % 5, 1)]
        bucket = Bucket.of(batch_of(rows), most, longest=most)
        assert sum(rows) <= bucket.tokens < sum(rows) + step
        assert bucket.rows >= len(rows) + 1 and bucket.supervised <= bucket.tokens
        seen.add(bucket.tokens)
    assert len(seen) <= 17 and max(seen) < most + step


def test_steps_of_one_number_of_examples_fall_into_few_buckets():
    random = np.random.default_rng(0)
    steps = [batch_of(random.integers(8, 300, 8)) for _ in range(200)]
    buckets = {Bucket.of(step, max(step.tokens for step in steps), longest=300) for step in steps}
    assert len(buckets) <= 20 and {bucket.rows for bucket in buckets} == {16}


def test_rows_of_one_round_length_are_not_filled_up():
    bucket = Bucket.of(batch_of([256] * 3), 2048, longest=2048)
    assert bucket.even and (bucket.tokens, bucket.rows, bucket.longest) == (768, 3, 256)
    found = bucket.batch_of(bucket.filled(batch_of([256] * 3)))
    assert found.segments.layout.tolist() == [3, 256]
    assert not Bucket.of(batch_of([250] * 3), 2048, longest=2048).even
    # two groups, the first as large as all rows together when padded
    assert not Bucket.of(batch_of([256] * 2 + [196] * 2 + [60] * 2), 2048, longest=2048).even


def test_rows_that_differ_are_never_taken_for_rows_of_one_length():
    batch = batch_of([128] * 6 + [100, 28])
    bucket = Bucket.of(batch, 1024, longest=128)
    layout = bucket.batch_of(bucket.filled(batch)).segments.layout.tolist()
    assert len(layout) == 4 and layout[2:] == [0, 0]


def test_a_target_that_is_ignored_has_neither_loss_nor_gradient(model):
    batch = batch_of((20, 30))
    some = replace(batch, targets=torch.where(torch.arange(batch.supervised) < 9, batch.targets, IGNORED))
    fewer = replace(batch, targets=batch.targets[:9], predictors=batch.predictors[:9])
    with packed(model):
        assert summed_loss(model, some).item() == pytest.approx(summed_loss(model, fewer).item(), rel=1e-6)
