"""weights_folder: whole models on disk, as a checkpoint keeps them and as a finished run does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lorafit.backbone import FreshWeight, fresh_weights
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.config import RunConfig
from lorafit.errors import AdapterError, VerificationError
from lorafit.methods.full.sharding import free_gathered, is_shard
from lorafit.methods.saving import require_finite

SHARD_BYTES = 4 * 10**9
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class WeightsSnapshot:
    """Hold every weight of one moment on the host, by the model's own names.

    Attributes:
        tensors: the weights, in the precision in which they train.
        model: the model, which knows its configuration and the names in files.
    """

    tensors: Mapping[str, Tensor]
    model: Any

    @classmethod
    def of(cls, model: nn.Module) -> WeightsSnapshot:
        """Copy every weight of `model`. Training may continue while the copy is written."""
        stored = model.state_dict()  # without the buffers that are computed
        held = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in stored)]
        return cls({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in held}, model)

    @classmethod
    def gathered(cls, model: Any) -> WeightsSnapshot:
        """Copy a sharded `model` in its compute dtype to process 0; every process calls this."""
        free_gathered(model)
        tensors: dict[str, Tensor] = {}
        stored = model.state_dict(keep_vars=True)
        held = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in stored)]
        for name, tensor in held:
            whole = tensor.detach().full_tensor() if is_shard(tensor) else tensor.detach()
            if dist.get_rank() == 0:
                narrow = whole.to(model.dtype_of_shards) if is_shard(tensor) else whole
                tensors[name] = narrow.to("cpu", copy=True).contiguous()
        return cls(tensors, model)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def require_finite(self, where: Path) -> None:
        """Raise AdapterError if a weight is NaN or infinite. Such a model is never saved."""
        require_finite(self.tensors, where, "the model is not saved")

    def write(self, folder: Path) -> None:
        """Write a Hugging Face model, under the names of its checkpoint. It serves with a KV cache."""
        self.model.save_pretrained(folder, state_dict=dict(self.tensors), max_shard_size=SHARD_BYTES)
        path = folder / CONFIG_FILE
        config = json.loads(path.read_text(encoding="utf-8"))
        for part in (config, config.get("text_config", {})):
            if "use_cache" in part:
                part["use_cache"] = True  # training switches it off, since packed rows would read each other's keys
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into the weights of `model` that train, or into all. Raises AdapterError if they do not fit."""
    weights = dict(model.named_parameters())
    trained = {name for name, weight in weights.items() if weight.requires_grad} or set(weights)
    odd = sorted((set(tensors) - set(weights)) | (trained - set(tensors)))
    if odd:
        raise AdapterError(f"the weights do not fit this run: {odd[0]} is in only one of them", where=where)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if weights[name].shape != tensor.shape:
                raise AdapterError(f"the shape of the weights does not fit {name}", where=where)
            weights[name].copy_(tensor)


@dataclass(frozen=True)
class WholeWeights:
    """Hold a trained model on disk. It implements `lorafit.methods.TrainedWeights`.

    Attributes:
        folder: the folder of the model.
        count: number of its tensors.
    """

    folder: Path
    count: int

    @classmethod
    def open(cls, folder: Path, config: RunConfig) -> WholeWeights:
        """Return the model in `folder`. Raises VerificationError if its weights are those of the base of `config`."""
        whole = cls(folder, len(Checkpoint.open(folder).names()))
        if not _differ(fresh_weights(config, "original"), fresh_weights(whole.source(config), "original")):
            raise VerificationError("every weight is the base's own: the model was not trained", where=str(folder))
        return whole

    def __len__(self) -> int:
        """Return the number of trained tensors."""
        return self.count

    def source(self, config: RunConfig) -> RunConfig:
        """Return the settings whose base is the trained model itself."""
        return config.model_copy(update={"base": str(self.folder), "revision": None})

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return `weight`, which is the trained one already."""
        return weight

    def check_found(self, names: Iterable[str]) -> None:
        """Raise VerificationError unless `names` are as many as the model's tensors."""
        found = len(set(names))
        if found < self.count:
            raise VerificationError(f"only {found} of the model's {self.count} tensors were written")


def _differ(base: Iterator[FreshWeight], trained: Iterator[FreshWeight]) -> bool:
    """Return True if a weight differs from its counterpart in the base. Reading ends at the first that does."""
    ahead: dict[str, Tensor] = {}
    for old in base:
        while old.parameter not in ahead and (new := next(trained, None)) is not None:
            ahead[new.parameter] = new.tensor
        tensor = ahead.pop(old.parameter, None)
        if tensor is not None and not torch.equal(tensor.to(old.tensor.dtype), old.tensor):
            return True
    return False
