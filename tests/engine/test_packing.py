"""Micro-batches: what is supervised, and nothing else."""

import numpy as np
import pytest

from lorafit.engine import MicroBatch, collate
from lorafit.engine.cuda_graphs import Bucket
from lorafit.errors import TrainingError


def test_positions_restart_and_targets_follow_their_predictors():
    rows = [
        (np.array([5, 6, 7]), np.array([False, True, True])),
        (np.array([8, 9]), np.array([False, True])),
    ]
    batch = collate(rows)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predictors.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]


def test_a_rows_first_token_is_never_predicted_from_its_neighbour():
    everything = np.array([True, True])
    batch = collate([(np.array([5, 6]), everything), (np.array([7, 8]), everything)])
    assert batch.targets.tolist() == [6, 8]


def test_collating_leaves_the_rows_masks_alone():
    mask = np.array([True, True])
    collate([(np.array([5, 6]), mask)])
    assert mask.all()


def test_fields_that_would_be_lost_on_the_way_to_a_gpu_are_an_error_that_names_the_class():
    class Preferred(MicroBatch):
        pass

    batch = collate([(np.arange(4), np.ones(4, bool))])
    marked = Preferred(batch.ids, batch.positions, batch.predictors, batch.targets, batch.segments)
    with pytest.raises(TrainingError, match=r"MicroBatch.to carries the fields of MicroBatch alone, and Preferred"):
        marked.to("cpu")
    with pytest.raises(TrainingError, match=r"a CUDA graph carries .* Preferred"):
        Bucket.of(marked, 64, 64)
