"""Backbone: the frozen base, loaded and quantized.

No other package imports bitsandbytes.
"""

from lorafit.backbone.architecture import (
    base_skeleton,
    compute_dtype,
    computes_in_fp8,
    decoder_layers,
    default_device,
    failed_forward,
    is_packed_base,
    linears_to_quantize,
    load_whole,
    output_head,
    require_twin,
    text_decoder,
    unwrapped,
)
from lorafit.backbone.base_checkpoint import base_damages, base_fingerprint, require_same_base
from lorafit.backbone.computing_in import computing_in, rounding_activations
from lorafit.backbone.experts import (
    FrozenExpertsLinear,
    experts_to_quantize,
    frozen_in,
    frozen_weights,
    quantize_experts,
    stacked_experts,
    transposed_experts,
    unfreeze_experts,
)
from lorafit.backbone.fresh_weights import FreshWeight, fresh_weights
from lorafit.backbone.kernels.frozen_linear import (
    FrozenLinear4bit,
    dequantize,
    dequantize_linear,
    dequantize_linears,
    forget_quantization,
    freeze_linears,
    quantize,
    true_numel,
)
from lorafit.backbone.kernels.frozen_linear_fp8 import frozen_features
from lorafit.backbone.kernels.grouped_product import grouped_linear
from lorafit.backbone.kernels.packed_product import multiply_packed
from lorafit.backbone.kernels.trained_linear_fp8 import TrainedLinearFp8, product_fp8, takes_fp8
from lorafit.backbone.library_logging import redirect_library_logs
from lorafit.backbone.load import load_backbone, nf4_config, stored_dtype
from lorafit.backbone.projections import (
    adapter_obstacles,
    experts_per_token,
    is_mixture,
    is_plain_linear,
    linear_size,
    names_of_old_experts,
    projections_of,
)
from lorafit.backbone.shards import (
    load_sharded,
    read_sharded,
    require_unchanged,
    shard_layers,
    shards_of,
)
from lorafit.backbone.skeleton.recurrence import recurrent_parts
from lorafit.backbone.stored_weights import packed_weights, plain_name, with_stored_weights

__all__ = [
    "FreshWeight",
    "FrozenExpertsLinear",
    "FrozenLinear4bit",
    "TrainedLinearFp8",
    "adapter_obstacles",
    "base_damages",
    "base_fingerprint",
    "base_skeleton",
    "compute_dtype",
    "computes_in_fp8",
    "computing_in",
    "decoder_layers",
    "default_device",
    "dequantize",
    "dequantize_linear",
    "dequantize_linears",
    "experts_per_token",
    "experts_to_quantize",
    "failed_forward",
    "forget_quantization",
    "freeze_linears",
    "fresh_weights",
    "frozen_features",
    "frozen_in",
    "frozen_weights",
    "grouped_linear",
    "is_mixture",
    "is_packed_base",
    "is_plain_linear",
    "linear_size",
    "linears_to_quantize",
    "load_backbone",
    "load_sharded",
    "load_whole",
    "multiply_packed",
    "names_of_old_experts",
    "nf4_config",
    "output_head",
    "packed_weights",
    "plain_name",
    "product_fp8",
    "projections_of",
    "quantize",
    "quantize_experts",
    "read_sharded",
    "recurrent_parts",
    "redirect_library_logs",
    "require_same_base",
    "require_twin",
    "require_unchanged",
    "rounding_activations",
    "shard_layers",
    "shards_of",
    "stacked_experts",
    "stored_dtype",
    "takes_fp8",
    "text_decoder",
    "transposed_experts",
    "true_numel",
    "unfreeze_experts",
    "unwrapped",
    "with_stored_weights",
]
