"""A mixture of experts in NF4 on one GPU, beside transformers + PEFT: peak memory and tokens/s on rows of one length.

    python bench/mixtures.py base DIR                   # Qwen3-30B-A3B's shape: no weights are written (a second)
    python bench/mixtures.py run lorafit DIR [options]  # through lorafit.train, experts in 4 bits; one JSON line
    python bench/mixtures.py run hf DIR [options]       # transformers + PEFT + bitsandbytes, experts in 16 bits

The weights are random and are made on the GPU, a layer at a time, and quantized there by the functions that load a real
base; speed and memory do not depend on their values. The base's folder holds config.json, a small tokenizer and a
sparse safetensors file with the true header and no data, which planning and the checks before training read.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

GIB = 1 << 30
SIZES: dict[str, dict[str, Any]] = {
    "30b-a3b": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 1024,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    base = verbs.add_parser("base")
    base.add_argument("folder")
    base.add_argument("--size", default="30b-a3b", choices=tuple(SIZES))
    base.add_argument("--layers", type=int, default=0, help="instead of the shape's own number")
    run = verbs.add_parser("run")
    run.add_argument("arm", choices=("lorafit", "hf"))
    run.add_argument("folder")
    run.add_argument("--targets", default="qv", choices=("qv", "attention", "experts"))
    run.add_argument("--rows", type=int, default=4, help="rows of one step")
    run.add_argument("--length", type=int, default=2048, help="tokens of a row")
    run.add_argument("--vram", type=float, default=0, help="budget of lorafit in GiB; 0 is all of the GPU")
    run.add_argument("--activations", default="auto", help="memory policy of lorafit")
    run.add_argument("--steps", type=int, default=8)
    run.add_argument("--warm", type=int, default=3)
    options = parser.parse_args()
    {"base": make_base, "run": run_arm}[options.verb](options)


def make_base(options: argparse.Namespace) -> None:
    """Write config.json, a tokenizer, and a safetensors file that has a header and no data on the disk."""
    import torch
    from transformers import Qwen3MoeConfig

    sizes = SIZES[options.size] | ({"num_hidden_layers": options.layers} if options.layers else {})
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = Qwen3MoeConfig(max_position_embeddings=8192, dtype=torch.bfloat16, **sizes, **tokens)
    made = write_base(config, Path(options.folder))
    print(json.dumps({"made": options.folder, "parameters": made}))


def write_base(config: Any, folder: Path) -> int:
    """Write config.json, a tokenizer, and the header of the weights; return their number."""
    import torch
    from make_random_base import make_tokenizer
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    header, end = {}, 0
    for name, weight in model.named_parameters():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end // 2


def run_arm(options: argparse.Namespace) -> None:
    import torch

    result = {name: getattr(options, name) for name in ("arm", "targets", "rows", "length", "vram")}
    try:
        result |= run_lorafit(options) if options.arm == "lorafit" else run_hf(options)
    except torch.OutOfMemoryError as error:
        result |= {"error": "out of memory", "message": str(error)[:120]}
    print(json.dumps(result))


def run_lorafit(options: argparse.Namespace) -> dict[str, object]:
    """One training run through lorafit.train, whose base is made on the GPU instead of read."""
    import torch

    import engine
    import lorafit.api.build_model as build_model

    made: dict[str, float] = {}

    def load(config: Any, **_: object) -> Any:
        started = time.perf_counter()
        model = random_backbone(options.folder)
        torch.cuda.empty_cache()
        made.update(make_s=round(time.perf_counter() - started, 1))
        made.update(base_gib=round(torch.cuda.memory_allocated() / GIB, 2))
        made.update(making_peak_gib=round(torch.cuda.max_memory_allocated() / GIB, 2))
        torch.cuda.reset_peak_memory_stats()
        return model

    build_model.load_backbone = load
    engine.TARGETS_OF_LORAFIT["experts"] = "all-linear+experts"
    own = {"work": "dense", "examples": options.rows, "compute": "bf16", "deterministic": False}
    rest = {"dropout": 0.0, "profile": "", "set": []}
    return engine.run_lorafit(argparse.Namespace(**vars(options), **own, **rest)) | made


def note_row_mode(seen: dict[str, object], *, alone: bool = False) -> None:
    """Let `seen["rows"]` say how the rows of the next run share a forward; with `alone` each gets its own."""
    import lorafit.api.build_model as build_model

    proved = build_model.prove_rows

    @wraps(proved)
    def prove(model: Any, rows: Any, longest: int = 0) -> Any:
        mode, loss = proved(model, rows, longest)
        if alone:
            mode = build_model.RowMode(mode.reason or "as asked", "as asked")
        seen["rows"] = mode.in_words
        return mode, loss

    build_model.prove_rows = prove


def random_backbone(folder: str) -> Any:
    """Return the base of `folder` as `load_backbone` does, with random weights, on the GPU if there is one."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from lorafit.backbone import default_device, experts_to_quantize, quantize, quantize_experts
    from lorafit.backbone.architecture import linears_to_quantize, read_architecture, use_no_cache, without_noise

    device, dtype = default_device(), torch.bfloat16
    torch.manual_seed(0)
    architecture = without_noise(read_architecture(Path(folder)))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)

    # a norm of gain 1 + weight would double every stream, and drown a comparison of rows in rounding
    kind = architecture.get_text_config().model_type
    gain = torch.zeros if kind.startswith(("gemma", "qwen3_5", "qwen3_next")) else torch.ones

    def drawn(weight: Any) -> torch.nn.Parameter:
        if weight.dim() == 1:
            return torch.nn.Parameter(gain(weight.shape, device=device, dtype=dtype), requires_grad=False)
        values = torch.empty(weight.shape, device=device, dtype=dtype).normal_(std=0.02)
        return torch.nn.Parameter(values, requires_grad=False)

    linears, experts = linears_to_quantize(model), experts_to_quantize(model)
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        weight = drawn(model.get_parameter(f"{name}.weight"))
        setattr(model.get_submodule(parent), leaf, quantize(weight, compute_dtype=dtype))
    for path in dict.fromkeys(name.rpartition(".")[0] for name in experts):
        module = model.get_submodule(path)
        for name in [name for name in experts if name.startswith(f"{path}.")]:
            module._parameters[name.rpartition(".")[2]] = drawn(model.get_parameter(name))
        quantize_experts(module, dtype)
    for name, weight in list(model.named_parameters()):
        if weight.is_meta:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = drawn(weight)
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    use_no_cache(model)
    return model.to(device).requires_grad_(False).eval()


def run_hf(options: argparse.Namespace) -> dict[str, object]:
    """transformers + PEFT as a user has it: linears in NF4 by bitsandbytes, experts in bf16, layers recomputed."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model

    model = hf_model(options.folder)
    targets = {"qv": ["q_proj", "v_proj"]}.get(options.targets, ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    if options.targets == "experts":
        lora.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
        lora.rank_pattern, lora.alpha_pattern = {".*experts.*": 2}, {".*experts.*": 4}
    model = get_peft_model(model, lora).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = bnb.optim.PagedAdamW8bit(weights, lr=2e-4)
    base_gib = round(torch.cuda.memory_allocated() / GIB, 2)
    dice = torch.Generator().manual_seed(1)
    batches = [torch.randint(3, 600, (options.rows, options.length), generator=dice).cuda() for _ in range(4)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = 0.0
    for step in range(options.warm + options.steps):
        if step == options.warm:
            torch.cuda.synchronize()
            began = time.perf_counter()
        ids = batches[step % len(batches)]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / options.steps
    return {
        "tokens_s": round(options.rows * options.length / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "base_gib": base_gib,
        "trainable": sum(weight.numel() for weight in weights),
        "loss": round(float(loss), 4),
    }


def hf_model(folder: str) -> Any:
    """Return transformers' own model with random weights on the GPU: linears as `Linear4bit`, experts in bf16."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and path != "lm_head":
            linear = Linear4bit(
                module.in_features, module.out_features, False, torch.bfloat16, True, "nf4", device="meta"
            )
            linear.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=linear).to(
                "cuda"
            )
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
    model.is_loaded_in_4bit, model.config.use_cache = True, False
    torch.cuda.empty_cache()
    return model.requires_grad_(False)


if __name__ == "__main__":
    main()
