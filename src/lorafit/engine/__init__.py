"""Engine: packed micro-batches, attention, loss, decoder layers, autotune and generation."""

from lorafit.engine.attention.packed import packed, unpacked, use_packed_attention, use_plain_attention
from lorafit.engine.autotune.dry_run import DryRun, find_policy
from lorafit.engine.autotune.problem import Workload
from lorafit.engine.autotune.sharded import prove_policy
from lorafit.engine.cuda_graphs import Graphs
from lorafit.engine.generate import generate
from lorafit.engine.isolation import Isolation, assert_isolated
from lorafit.engine.layers.decoder import DecoderLayers
from lorafit.engine.layers.host_embeddings import keep_embeddings_on_host
from lorafit.engine.logits import logits_at, padded_logits
from lorafit.engine.loss.vocabulary import VocabularyLoss, summed_loss, supervised_logits, vocabulary_loss_for
from lorafit.engine.packing import MicroBatch, Segments, Step, collate
from lorafit.engine.row_mode import PACKED, RowMode, prove_rows, require_runs
from lorafit.engine.runtime import (
    PAGE_BYTES,
    allocator_retries,
    let_blocks_grow,
    lock_pages_by_threads,
    release_memory,
    warm_compiler,
)

__all__ = [
    "logits_at",
    "padded_logits",
    "PACKED",
    "RowMode",
    "prove_policy",
    "prove_rows",
    "require_runs",
    "PAGE_BYTES",
    "allocator_retries",
    "let_blocks_grow",
    "lock_pages_by_threads",
    "release_memory",
    "DecoderLayers",
    "Graphs",
    "DryRun",
    "find_policy",
    "Workload",
    "Isolation",
    "MicroBatch",
    "Segments",
    "Step",
    "VocabularyLoss",
    "assert_isolated",
    "collate",
    "generate",
    "keep_embeddings_on_host",
    "packed",
    "summed_loss",
    "supervised_logits",
    "unpacked",
    "use_packed_attention",
    "use_plain_attention",
    "vocabulary_loss_for",
    "warm_compiler",
]
