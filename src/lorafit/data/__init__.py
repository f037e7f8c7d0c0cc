"""Data: file -> records -> template -> masked token rows -> packed batches."""

from lorafit.data.fixing import FixReport, fix_rows
from lorafit.data.gather import parse_rows
from lorafit.data.pack import epoch_order, largest_step, pack_step, pad_step, padded_share, steps_per_epoch
from lorafit.data.prepare import Prepared, prepare, require_clean
from lorafit.data.schema.records import Record
from lorafit.data.shown import ShownRow, show_rows
from lorafit.data.sources.reader import raw_rows
from lorafit.data.store import Rows
from lorafit.data.summary import Progress, Summary
from lorafit.data.template.template import Encoded, Template
from lorafit.data.tokenizer.token_ids import token_ids
from lorafit.data.tokenizer.tokenizer import TextTokenizer

__all__ = [
    "Encoded",
    "FixReport",
    "Prepared",
    "Progress",
    "Record",
    "Rows",
    "ShownRow",
    "Summary",
    "Template",
    "TextTokenizer",
    "epoch_order",
    "fix_rows",
    "largest_step",
    "pack_step",
    "pad_step",
    "padded_share",
    "parse_rows",
    "prepare",
    "raw_rows",
    "require_clean",
    "show_rows",
    "steps_per_epoch",
    "token_ids",
]
