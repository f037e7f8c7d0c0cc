"""Engine: packed micro-batches, attention, loss, decoder layers, autotune and generation."""

from lorafit.engine.attention.packed import packed, unpacked, use_packed_attention, use_plain_attention
from lorafit.engine.autotune.dry_run import DryRun, find_policy
from lorafit.engine.autotune.problem import Workload
from lorafit.engine.autotune.sharded import prove_policy
from lorafit.engine.cuda_graphs import Graphs
from lorafit.engine.generate import generate
from lorafit.engine.isolation import Isolation, require_isolated
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
    "PACKED",
    "PAGE_BYTES",
    "DecoderLayers",
    "DryRun",
    "Graphs",
    "Isolation",
    "MicroBatch",
    "RowMode",
    "Segments",
    "Step",
    "VocabularyLoss",
    "Workload",
    "allocator_retries",
    "collate",
    "find_policy",
    "generate",
    "keep_embeddings_on_host",
    "let_blocks_grow",
    "lock_pages_by_threads",
    "logits_at",
    "packed",
    "padded_logits",
    "prove_policy",
    "prove_rows",
    "release_memory",
    "require_isolated",
    "require_runs",
    "summed_loss",
    "supervised_logits",
    "unpacked",
    "use_packed_attention",
    "use_plain_attention",
    "vocabulary_loss_for",
    "warm_compiler",
]
