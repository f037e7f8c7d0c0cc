"""PlanInputs: the settings, data stats, model shape and device of a plan, as one object."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lorafit.config import HEAD, RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import Hardware
from lorafit.shapes import ModelShape, Projection, expert_rank, resolve_targets

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2}
"""Bytes of an activation by compute dtype. fp8 narrows only the operands of frozen matmuls, which are temporary."""
LARGEST_TOKENS = 16_384
"""Tokens beyond which a larger micro-batch gains nothing. Its fixed costs are about 3 % of its time."""
SUPERVISED_SPREAD = 1.25
"""Supervised share of the most supervised micro-batch, relative to the mean one."""
ADAM_BYTES, ADAM_8BIT_BYTES = 8, 2 + 8 / 256
"""Bytes of AdamW's two moments for each trained weight. They are in fp32, or in 8 bits with an fp32 scale per 256."""
ADAPTER_BYTES = 4
"""Bytes of an adapter's weight, which is in fp32."""
MASTER_BYTES = 4
"""Bytes of a 16-bit weight's copy in fp32."""
UPDATE_BYTES = 29 << 24
"""Most bytes that updates within the backward pass take beside the gradient: 29 for each value of a chunk."""
OPTIMIZER_SHARE = 0.03
"""Share of a GPU's memory up to which AdamW's moments stay in 32 bits. The 8-bit optimizers are slower: they launch
kernels tensor by tensor, and the paged ones wait for the device every step."""


@dataclass(frozen=True, slots=True)
class DataStats:
    """Hold the size of the training data in rows and tokens.

    Attributes:
        rows: Training rows, without the held-out ones.
        tokens: Tokens of the training rows.
        supervised_tokens: Tokens in the loss.
        longest: Tokens of the longest row.
        mean_tokens: Tokens of the mean row.
        holdout_rows: Held-out rows.
        largest_step: Tokens of the run's largest step; 0 when not counted, which stands for a step of the longest rows.
        padded_share: Share of a padded micro-batch's tokens that are rows'.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    mean_tokens: float
    holdout_rows: int = 0
    largest_step: int = 0
    padded_share: float = 1.0

    @property
    def supervised_share(self) -> float:
        """Share of the tokens that are in the loss."""
        return self.supervised_tokens / self.tokens if self.tokens else 1.0


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """Hold the size of one micro-batch in tokens.

    Attributes:
        tokens: All tokens.
        supervised: Tokens in the loss.
        longest: Tokens of the longest row.
    """

    tokens: int
    supervised: int
    longest: int


@dataclass(frozen=True)
class PlanInputs:
    """Hold the inputs of a plan, from which memory, time and method follow.

    Attributes:
        config: Settings of the run.
        stats: Size of the training data.
        shape: Sizes of the model.
        hardware: Device that the run is planned for.
    """

    config: RunConfig
    stats: DataStats
    shape: ModelShape
    hardware: Hardware

    def with_settings(self, **changes: Any) -> PlanInputs:
        """Return the same inputs with other settings."""
        return replace(self, config=self.config.model_copy(update=changes))

    def on(self, hardware: Hardware) -> PlanInputs:
        """Return the same inputs for another device."""
        return replace(self, hardware=hardware)

    @property
    def on_cuda(self) -> bool:
        """True when the device runs CUDA."""
        return self.hardware.kind == "cuda"

    @cached_property
    def compute(self) -> str:
        """Matmul precision. On auto it is bf16 if the GPU has it, fp16 on other GPUs, fp32 on a CPU."""
        if self.config.compute != "auto":
            return self.config.compute
        if not self.on_cuda:
            return "fp32"
        return "bf16" if self.hardware.bf16 else "fp16"

    @property
    def width(self) -> int:
        """Bytes of one activation value."""
        return WIDTH[self.compute]

    @property
    def is_full(self) -> bool:
        """True when every weight trains."""
        return self.config.method == "full"

    @property
    def is_dora(self) -> bool:
        """True when the adapters train the lengths of the rows too."""
        return self.config.dora and not self.is_full

    @property
    def in_4_bits(self) -> bool:
        """True when the base's linear layers are in NF4."""
        return self.config.quantization == "nf4"

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules with an adapter. Raises AdapterError for names that the model lacks.

        In full fine-tuning they are all linear modules, whose inputs the backward pass needs as well.
        """
        if self.is_full:
            return self.shape.module_names
        return resolve_targets(self.config.targets, self.shape.projections, self.shape.family)

    @cached_property
    def adapter_parameters(self) -> int:
        """Weights that train beside a frozen base: rank × (inputs + outputs) for each target, DoRA's magnitudes, rows
        of tokens, and whole modules."""
        rows = len(set(self.config.trainable_tokens)) * self.shape.hidden * (1 if self.shape.tied_embeddings else 2)
        adapters = 0 if self.is_full else sum(map(self._adapter_weights, self.shape.named(self.targets))) + rows
        return adapters + self.whole_parameters

    @property
    def whole_parameters(self) -> int:
        """Weights of the embedding and the head that train whole beside the adapters; tied ones count once."""
        whole = () if self.is_full else self.config.modules_to_save
        return self.shape.vocab * self.shape.hidden * (min(len(whole), 1) if self.shape.tied_embeddings else len(whole))

    @property
    def head_gradient_bytes(self) -> int:
        """Bytes that the loss takes for each weight of a head that trains; 0 for a frozen one.

        They are the gradient's sum in fp32. Beside a frozen head of 16 bits, the table in fp32 is rounded for each
        chunk, whose gradient exists in both precisions.
        """
        if self.is_full:
            return MASTER_BYTES
        trains = self.whole_parameters and (HEAD in self.config.modules_to_save or self.shape.tied_embeddings)
        return 2 * MASTER_BYTES + (2 * self.width if self.width < MASTER_BYTES else 0) if trains else 0

    @property
    def trains_outside_layers(self) -> bool:
        """True when weights of the embedding or the head train beside the adapters, whose gradients no graph holds."""
        return not self.is_full and bool(self.config.trainable_tokens or self.config.modules_to_save)

    @property
    def initial_parameters(self) -> int:
        """Frozen weights of the initial products, as many as train; 0 for adapters without one."""
        if self.config.stored_rank == self.config.rank:
            return 0
        return sum(map(self._adapter_weights, self.shape.named(self.targets)))

    @cached_property
    def active_adapter_parameters(self) -> float:
        """Weights of adapters that one token is multiplied with."""
        each = sum(self._adapter_weights(part) * part.active for part in self.shape.named(self.targets))
        return each * self.config.stored_rank / self.config.rank

    def _adapter_weights(self, part: Projection) -> int:
        rank = expert_rank(self.config.rank, self.shape.experts_per_token) if part.stacked else self.config.rank
        return (rank * (part.inputs + part.outputs) + int(self.is_dora) * part.outputs) * part.count

    @property
    def trained_parameters(self) -> int:
        """Weights that train: those of the adapters, or all but the towers'."""
        return self.shape.parameters - self.shape.tower_parameters if self.is_full else self.adapter_parameters

    @property
    def has_master_weights(self) -> bool:
        """True when 16-bit weights train by fp32 copies, as AdamW in 32 bits needs them."""
        return self.is_full and self.width < WIDTH["fp32"] and self.optimizer == "adamw"

    @property
    def optimizer(self) -> str:
        """Optimizer. On auto its moments are in 32 bits while they fit OPTIMIZER_SHARE of the GPU, else in 8."""
        if self.config.optimizer != "auto":
            return self.config.optimizer
        if self.is_full:
            return "adamw"
        small = self.adapter_parameters * ADAM_BYTES <= OPTIMIZER_SHARE * self.hardware.memory_bytes
        return "adamw" if small or not self.on_cuda else "paged_adamw_8bit"

    @property
    def updates_in_backward(self) -> bool:
        """True when 16-bit weights are updated within the backward pass, with 8-bit moments in host memory."""
        paged = self.optimizer == "paged_adamw_8bit" and self.width < WIDTH["fp32"]
        return self.is_full and self.on_cuda and self.shards == 1 and paged

    @property
    def host_moment_bytes(self) -> int:
        """Bytes of moments in host memory."""
        return round(self.trained_parameters * moment_bytes(self.optimizer)) if self.updates_in_backward else 0

    @property
    def between_bytes(self) -> int:
        """Bytes of gradients that each micro-batch of a step after the first moves to host memory and back."""
        return 2 * self.width * self.trained_parameters if self.updates_in_backward else 0

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint: the trained weights, their fp32 copies and their moments."""
        weight = self.width + MASTER_BYTES * self.has_master_weights if self.is_full else ADAPTER_BYTES
        if self.shards > 1 and self.has_master_weights:
            weight = MASTER_BYTES  # the shards are the copies
        initial = 0 if self.is_full else 2 * ADAPTER_BYTES * self.initial_parameters  # stored plain, and once more
        return round(self.trained_parameters * (weight + moment_bytes(self.optimizer))) + initial

    @cached_property
    def policy(self) -> MemoryPolicy | None:
        """Memory policy of the settings; None for auto, which the plan decides."""
        return policy_of(self.config, self.shape.layers)

    @property
    def gpus(self) -> int:
        """GPUs that share a step. A CPU is one."""
        if not self.on_cuda:
            return 1
        asked = self.config.gpus or (self.hardware.count if self.config.gpu else 1)
        return self.hardware.count if asked == "all" else asked

    @property
    def shards(self) -> int:
        """GPUs over which every weight is sharded; 1 where each has a copy of the base."""
        return self.gpus if self.is_full else 1

    @property
    def base_shards(self) -> int:
        """GPUs over which the layers of a frozen base are sharded; 1 where each has a copy."""
        return 1 if self.is_full or self.config.shard_base != "on" else self.gpus

    @property
    def largest_step_tokens(self) -> int:
        """Tokens of a GPU's share of the run's largest step, with their padding.

        Without a count the step is one of the longest rows. No share is less than one row.
        """
        step = self.stats.largest_step or self.config.examples_per_step * self.stats.longest
        step = max(1, round(min(step, self.stats.tokens or step) * self.padding))
        return min(step, max(-(-step // self.gpus), self.stats.longest))

    @property
    def padding(self) -> float:
        """Tokens that are computed for each token of a row: above 1 where rows are padded."""
        return 1 / self.stats.padded_share if self.shape.is_padded else 1.0

    @property
    def mean_step_tokens(self) -> float:
        """Tokens of a GPU's share of the mean step."""
        rows = min(self.config.examples_per_step, max(self.stats.rows, 1))
        return max(1.0, rows * self.stats.mean_tokens / self.gpus)

    @property
    def most_tokens(self) -> int:
        """Most tokens of an automatically chosen micro-batch."""
        if not self.on_cuda:
            return self.config.max_length
        return most_tokens(self.largest_step_tokens, self.config.max_length)

    def micro_batch(self, limit: int) -> MicroBatchSize:
        """Return the largest micro-batch of at most `limit` tokens. A longer row has a micro-batch of its own."""
        longest = min(self.stats.longest, self.largest_step_tokens)
        tokens = longest if self.shape.alone else min(max(limit, self.stats.longest), self.largest_step_tokens)
        supervised = min(tokens, round(tokens * self.stats.supervised_share * SUPERVISED_SPREAD))
        return MicroBatchSize(tokens, supervised, min(tokens, self.stats.longest))


def moment_bytes(optimizer: str) -> float:
    """Return the bytes of AdamW's two moments for each trained weight: 32 bits each (adamw), or 8."""
    return ADAM_BYTES if optimizer == "adamw" else ADAM_8BIT_BYTES


def most_tokens(step_tokens: int, max_length: int) -> int:
    """Return the most tokens of a micro-batch on a GPU.

    It holds a whole step, at most LARGEST_TOKENS and at least `max_length`.
    """
    return max(max_length, min(step_tokens, LARGEST_TOKENS))


def policy_of(config: RunConfig, layers: int) -> MemoryPolicy | None:
    """Return the policy in the setting `memory_policy`; None for auto, which the plan decides."""
    return None if config.memory_policy == "auto" else MemoryPolicy.parse(config.memory_policy, layers)
