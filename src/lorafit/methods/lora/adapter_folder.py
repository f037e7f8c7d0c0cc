"""adapter_folder: an adapter on disk in PEFT's format, saved, checked and loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafit.backbone import linear_size, names_of_old_experts, stacked_experts
from lorafit.config import RunConfig, read_json
from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict
from lorafit.methods.lora.attach import check_attached, linear_names, matching
from lorafit.methods.lora.dora import MAGNITUDE, prepare_dora
from lorafit.methods.lora.expert_adapters import (
    adapted_layers,
    as_parameters,
    beside_experts,
    bind_experts,
    check_expert_settings,
    parameter_of,
    split_parameters,
)
from lorafit.methods.lora.foreign_settings import check_keys, check_values, is_name, jsonable, plain_settings, scale_of
from lorafit.methods.lora.initial.principal import (
    INITIAL_FILE,
    initial_tensors,
    plain_factors,
    principal_layers,
    read_initial,
    restore_product,
)
from lorafit.methods.lora.token_rows import ENDING, load_rows, restore_rows, row_modules, table_names
from lorafit.methods.saving import require_finite, save_snapshot

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = ".weight"
"""The end of a key of a module that is trained whole."""
NEEDED_KEYS = frozenset(
    ("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
     "target_modules", "bias", "fan_in_fan_out", "init_lora_weights", "inference_mode", "modules_to_save")
)  # fmt: skip
"""Keys of adapter_config.json that are always written; PEFT 0.5 knew all of them."""


@dataclass(frozen=True)
class AdapterFiles:
    """Hold a checked adapter folder. Its weights are read on demand.

    Attributes:
        folder: the adapter folder.
        rank: LoRA's rank r.
        scale: alpha / r, or alpha / √r for rsLoRA.
        targets: the target modules, sorted, with the linears among PEFT's `target_parameters`.
        transposed: True if the base stores its weights as (in, out), as Conv1D does.
        dora: True if the adapter has magnitudes, one for each row of a weight.
        parameters: PEFT's `target_parameters`, the stacked experts with adapters, sorted.
        expert_rank: the rank of an expert's adapter.
        tokens: module -> ids of the tokens whose rows are trained.
        tables: PEFT's `modules_to_save`, the modules that are trained whole.
    """

    folder: Path
    rank: int
    scale: float
    targets: tuple[str, ...]
    transposed: bool = False
    dora: bool = False
    parameters: tuple[str, ...] = ()
    expert_rank: int = 0
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tables: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> AdapterFiles:
        """Check the adapter in `folder`. Raises AdapterError with one sentence for untrusted files."""
        for suffix in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"):
            for path in folder.glob(suffix):
                raise AdapterError(
                    f"{path.name} is a pickle, which can run code when it is loaded",
                    where=str(folder),
                    fix="keep adapters as safetensors",
                )
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise AdapterError(f"{name} is missing", where=str(folder), fix="name the folder of a LoRA adapter")
        raw = read_json(folder / CONFIG_FILE, AdapterError)
        where = str(folder / CONFIG_FILE)
        check_keys(raw, where)
        check_values(raw, where)
        scale = scale_of(raw, where)
        check_expert_settings(raw, where, is_name)
        linears, experts = split_parameters(raw.get("target_parameters") or ())
        targets = tuple(sorted({*(raw.get("target_modules") or ()), *linears}))
        swapped, dora = (bool(raw.get(key)) for key in ("fan_in_fan_out", "use_dora"))
        expert_rank = next(iter((raw.get("rank_pattern") or {}).values()), raw["r"])
        tokens = {name: tuple(ids) for name, ids in (raw.get("trainable_token_indices") or {}).items()}
        tables = tuple(raw.get("modules_to_save") or ())
        return cls(folder, raw["r"], scale, targets, swapped, dora, experts, expert_rank, tokens, tables)

    def settings(self) -> LoraConfig:
        """Return PEFT's settings of this adapter, made of what was checked: no other key of the file has an effect."""
        settings = plain_settings(read_json(self.folder / CONFIG_FILE, AdapterError), self.rank, self.targets)
        if self.parameters:
            power = 0.5 if settings.use_rslora else 1.0
            settings.target_parameters, settings.lora_dropout = list(self.parameters), 0.0
            settings.rank_pattern = dict.fromkeys(self.parameters, self.expert_rank)
            settings.alpha_pattern = dict.fromkeys(self.parameters, self.scale * self.expert_rank**power)
        return settings

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (A (r, in), B (out, r)), fp32, by module name in the base; of experts by the parameter's name.

        A of experts is (experts · r, in), and B is (out, r · experts), as PEFT stores them.

        Raises AdapterError for invalid or non-finite weights.
        """
        return {module: _pair(module, sides, self) for module, sides in self._tensors().items()}

    def magnitudes(self) -> dict[str, Tensor]:
        """Return DoRA's magnitudes (out,), fp32, by module name in the base; empty for plain LoRA."""
        return {module: sides[MAGNITUDE] for module, sides in self._tensors().items()} if self.dora else {}

    def rows(self) -> dict[str, tuple[tuple[int, ...], Tensor]]:
        """Return (ids, rows (n, hidden)), fp32, by the name of the embedding or head; empty if no row was trained.

        No ids stand for a whole table.
        """
        if not self.tokens and not self.tables:
            return {}
        found = self._tensors(rows=True)
        rows = {name: (self.tokens.get(name, ()), sides[ENDING]) for name, sides in found.items() if ENDING in sides}
        if set(rows) != set(self.tokens) or any(len(table) != len(ids) for ids, table in rows.values()):
            raise AdapterError("the rows are not those of its tokens", where=str(self.folder / WEIGHTS_FILE))
        tables = {name: ((), sides[WHOLE]) for name, sides in found.items() if WHOLE in sides}
        if lacking := [name for name in self.tables if not matching((name,), list(tables))]:
            what = f"modules_to_save names {lacking[0]}, for which the adapter has no weights"
            raise AdapterError(what, where=str(self.folder / CONFIG_FILE))
        return rows | tables

    def _tensors(self, *, rows: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return the checked tensors of each module by their side: A, B, and for DoRA the magnitude."""
        found: dict[str, dict[str, Tensor]] = {}
        path = self.folder / WEIGHTS_FILE
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    wrapper, side = _parse_key(key, self)
                    if (side in (ENDING, WHOLE)) is not rows:
                        continue
                    module = parameter_of(wrapper, self.parameters) or wrapper
                    tensor = file.get_tensor(key)
                    found.setdefault(module, {})[side] = _checked(key, tensor, self.folder, 1 + (side != MAGNITUDE))
        except (SafetensorError, OSError) as error:
            raise AdapterError("the adapter's weights are truncated or unreadable", where=str(path)) from error
        if not found and not rows:
            raise AdapterError("the adapter holds no weights", where=str(path))
        for module, sides in found.items():
            if not rows and self.dora and MAGNITUDE not in sides:
                raise AdapterError(f"{module} lacks its magnitude", where=str(path))
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class AdapterSnapshot:
    """Hold an adapter's weights of one moment on the host, and its configuration.

    Attributes:
        tensors: the weights, by PEFT's names.
        settings: PEFT's LoraConfig.
        initial: the tensors of INITIAL_FILE; empty for adapters that began without a product.
    """

    tensors: Mapping[str, torch.Tensor]
    settings: Any
    initial: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PeftModel, config: RunConfig, *, base_name: str) -> AdapterSnapshot:
        """Copy the active adapter of `model`, in fp32. Training may continue while the copy is written."""
        lora = model.peft_config[model.active_adapter]
        assert lora.r == config.rank, "the adapter is not the one the settings describe"
        saved = copy.copy(lora)
        saved.revision = config.revision  # PEFT's auto classes load the base by it
        # sorted, since the order of a set differs from run to run
        old = names_of_old_experts(model)
        beside = beside_experts(model.get_base_model(), old)
        if parameters := {*(lora.target_parameters or ()), *beside}:
            saved.target_parameters, saved.lora_dropout = sorted(parameters), 0.0  # PEFT has no dropout for them
        saved.target_modules, saved.base_model_name_or_path, saved.inference_mode = (
            sorted(name for name in lora.target_modules if name.rpartition(".")[2] not in old),
            str(Path(base_name).expanduser().absolute()) if Path(base_name).expanduser().is_dir() else base_name,
            True,
        )
        live, name = get_peft_model_state_dict(model, save_embedding_layers=False), model.active_adapter
        for path, layer in principal_layers(model, name):
            live[f"{path}.lora_A.weight"], live[f"{path}.lora_B.weight"] = plain_factors(layer, name)
        base = model.get_base_model()
        tokens = {name: list(held.tokens) for name, held, _ in row_modules(base) if held.tokens}
        saved.trainable_token_indices, saved.modules_to_save = tokens or None, table_names(base) or None
        live |= {f"{PREFIX}{name}{ENDING if held.tokens else WHOLE}": rows for name, held, rows in row_modules(base)}
        if config.stored_rank != config.rank:
            saved.r, saved.lora_alpha, saved.use_rslora = config.stored_rank, config.scale * config.stored_rank, False
        return cls(
            {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in live.items()},
            saved,
            initial_tensors(model, name, PREFIX),
        )

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.initial.values()))

    def require_finite(self, where: Path) -> None:
        """Raise AdapterError if a weight is NaN or infinite. Such an adapter is never saved."""
        require_finite(self.tensors, where, "the adapter is not saved")

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which exists. The caller makes the write atomic."""
        save_file(dict(self.tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if self.initial:
            save_file(dict(self.initial), folder / INITIAL_FILE, metadata={"format": "pt"})
        text = json.dumps(_lean(self.settings), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def save_adapter(
    model: PeftModel,
    folder: Path,
    config: RunConfig,
    *,
    base_name: str,
    written: Callable[[Path], None] | None = None,
) -> None:
    """Write the adapter to `folder`, so that plain `PeftModel.from_pretrained` loads it.

    An existing folder is replaced. The folder appears completely or not at all, after `written` has seen the staged
    one. Raises RunDirError if it cannot be written, AdapterError if a weight is not finite.
    """
    save_snapshot(AdapterSnapshot.of(model, config, base_name=base_name), folder, written)


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Copy the weights in `folder` into the adapter of `model`. Raises AdapterError if they do not fit."""
    files = AdapterFiles.open(folder)
    weights, magnitudes = files.weights(), files.magnitudes()
    live = adapted_layers(model.get_base_model())
    if set(live) != set(weights):
        odd = min(set(live) ^ set(weights))
        raise AdapterError(f"the adapter does not fit this run: {odd} is in only one of them", where=str(folder))
    restore_rows(model.get_base_model(), files.rows(), str(folder))
    principal = dict(principal_layers(model.get_base_model(), model.active_adapter))
    initial = read_initial(folder, principal) if principal else {}
    with torch.no_grad():
        for name, (a, b) in weights.items():
            sides: Any = live[name]
            if name in principal:
                try:
                    restore_product(sides, model.active_adapter, (a, b), initial[name])
                except ValueError as error:
                    raise AdapterError(f"the adapter's shape does not fit {name}", where=str(folder)) from error
                continue
            for side, saved in ((sides.lora_A, a), (sides.lora_B, b)):
                weight = side[model.active_adapter].weight
                if weight.shape != saved.shape:
                    raise AdapterError(f"the adapter's shape does not fit {name}", where=str(folder))
                weight.copy_(saved)
            if name in magnitudes:
                sides.lora_magnitude_vector[model.active_adapter].weight.copy_(magnitudes[name])


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Return `model` with the adapter in `folder` attached, in fp32 and frozen.

    Raises AdapterError if the files are untrusted or do not fit the model.
    """
    files = AdapterFiles.open(folder)
    weights = fitting_weights(model, files)
    outside = matching(files.targets, [name for name, _ in model.named_modules()]) - set(weights)
    if outside:
        what = f"target_modules also selects {min(outside)}, for which the adapter has no weights"
        raise AdapterError(what, where=str(folder / CONFIG_FILE))
    with as_parameters(model):
        adapted = PeftModelForCausalLM(model, files.settings()).eval()
    load_rows(adapted.get_base_model(), files.rows(), str(folder))
    bind_experts(adapted)
    prepare_dora(adapted, is_new=False)
    check_attached(adapted, weights)
    # PEFT's own loading leaves an adapter whose key it renamed at zero, and puts whole tables into the base
    restore_adapter(adapted, folder)
    return adapted


def fitting_weights(model: nn.Module, files: AdapterFiles) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weights of `files` by module name, after checking that each fits a linear of `model`.

    Raises AdapterError if a target has no weights, a weight has no target, or a shape differs.
    """
    weights = files.weights()
    experts = stacked_experts(model)
    wanted = matching(files.targets, linear_names(model)) | matching(files.parameters, list(experts))
    nowhere = [name for name in files.parameters if not matching((name,), list(experts))]
    if set(weights) != wanted or nowhere:
        odd = min(nowhere or set(weights) ^ wanted)
        raise AdapterError(
            f"the adapter does not fit the base: {odd} is in only one of them",
            where=str(files.folder),
            fix="use its own base",
        )
    for name, (a, b) in weights.items():
        if name in experts:
            if (len(a) // files.expert_rank, a.shape[1], len(b)) != experts[name]:
                what = f"the adapter's shape does not fit {name}"
                raise AdapterError(what, where=str(files.folder), fix="use its own base")
            continue
        linear = model.get_submodule(name)
        if files.transposed and not isinstance(linear, Conv1D):
            what = f"fan_in_fan_out is true, but {name} stores its weight as (out, in)"
            raise AdapterError(what, where=str(files.folder / CONFIG_FILE), fix="set fan_in_fan_out to false there")
        if (a.shape[1], b.shape[0]) != linear_size(linear) or files.transposed != isinstance(linear, Conv1D):
            what = f"the adapter's shape does not fit {name}"
            raise AdapterError(what, where=str(files.folder), fix="use its own base")
    return weights


def _lean(settings: LoraConfig) -> dict[str, Any]:
    """Return PEFT's settings as JSON values, without the keys that say nothing.

    Each release of PEFT adds keys, and older releases raise TypeError for a key that they do not know.
    """
    values, usual = jsonable(settings.to_dict()), jsonable(LoraConfig().to_dict())
    return {key: value for key, value in values.items() if key in NEEDED_KEYS or value != usual.get(key)}


def _parse_key(key: str, files: AdapterFiles) -> tuple[str, str]:
    endings = {".lora_A.weight": "A", ".lora_B.weight": "B", **({f".{MAGNITUDE}": MAGNITUDE} if files.dora else {})}
    endings |= {ENDING: ENDING} if files.tokens else {}
    for ending, side in endings.items():
        if key.startswith(PREFIX) and key.endswith(ending):
            return key.removeprefix(PREFIX).removesuffix(ending), side
    if key.startswith(PREFIX) and key.endswith(WHOLE):
        module = key.removeprefix(PREFIX).removesuffix(WHOLE)
        if matching(files.tables, [module]):
            return module, WHOLE
    raise AdapterError(f"{key} is no LoRA weight", where=str(files.folder / WEIGHTS_FILE))


def _checked(key: str, tensor: Tensor, folder: Path, dimensions: int) -> Tensor:
    where = str(folder / WEIGHTS_FILE)
    if tensor.ndim != dimensions or not tensor.is_floating_point():
        raise AdapterError(f"{key} is no {'matrix' if dimensions > 1 else 'vector'} of floats", where=where)
    wide = tensor.float()  # 8-bit floats cannot be asked
    if not bool(torch.isfinite(wide).all()):
        raise AdapterError(f"{key} holds NaN or infinite values", where=where, fix="train again, or use a checkpoint")
    return wide


def _pair(module: str, sides: Mapping[str, Tensor], files: AdapterFiles) -> tuple[Tensor, Tensor]:
    where = str(files.folder / WEIGHTS_FILE)
    if not {"A", "B"} <= set(sides):
        raise AdapterError(f"{module} lacks its A or its B", where=where)
    found, rank = (sides["A"].shape[0], sides["B"].shape[1]), files.rank
    if files.parameters and any(module.endswith(f".{name}") or module == name for name in files.parameters):
        rank = files.expert_rank * max(1, found[0] // files.expert_rank)
    if found != (rank, rank):
        raise AdapterError(f"{module}'s weights do not have rank {files.rank}", where=where)
    if files.dora and sides[MAGNITUDE].shape[0] != sides["B"].shape[0]:
        raise AdapterError(f"{module}'s magnitude does not fit its B", where=where)
    return sides["A"], sides["B"]
