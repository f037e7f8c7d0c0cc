"""Bases as they are published quantized: MXFP4 experts (gpt-oss), and FP8 in blocks (DeepSeek V3, Qwen 3 FP8)."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

LARGEST_FP8 = 448.0


def publish(folder: Path, method: str, block: tuple[int, int] | None = (32, 32)) -> Path:
    """Quantize the saved base in `folder`: its experts in MXFP4, or its linears in FP8 with a scale a block."""
    names = [path.name for path in folder.glob("*.safetensors")]
    tensors = {name: value for file in names for name, value in load_file(folder / file).items()}
    made = {}
    for name, value in tensors.items():
        made |= _mxfp4(name, value) if method == "mxfp4" else _fp8(name, value, block)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": method, "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
    if method == "fp8":
        settings |= {"weight_block_size": list(block) if block else None, "activation_scheme": "dynamic", "fmt": "e4m3"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def _mxfp4(name, value):
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: value}
    experts, columns, rows = value.shape  # stored as (in, out)
    made = torch.Generator().manual_seed(len(name))
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=made, dtype=torch.uint8)
    scales = torch.randint(118, 125, (experts, rows, columns // 32), generator=made, dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def _fp8(name, value, block):
    if value.ndim != 2 or not name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
        return {name: value}
    if block is None:
        scale = value.float().abs().max() / LARGEST_FP8
        return {name: (value.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    rows, columns = (math.ceil(size / step) for size, step in zip(value.shape, block, strict=True))
    whole = pad(value.float(), (0, columns * block[1] - value.shape[1], 0, rows * block[0] - value.shape[0]))
    tiles = whole.view(rows, block[0], columns, block[1])
    scales = tiles.abs().amax((1, 3)).clamp(min=1e-6) / LARGEST_FP8
    packed = (tiles / scales[:, None, :, None]).view_as(whole)[: value.shape[0], : value.shape[1]]
    return {name: packed.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scales}
