"""Hybrids and attention sinks: how fast their rows train together, on one GPU; each arm prints one JSON line.

    python bench/hybrids.py hybrid            # Qwen 3.5's shape, rows as lorafit finds them proved
    python bench/hybrids.py hybrid --alone    # the same, one row a forward
    python bench/hybrids.py sinks             # gpt-oss-20b's shape, experts in 4 bits
    python bench/hybrids.py sinks --bare      # the same without the sinks' column of the softmax

Weights are random and made on the GPU (bench/mixtures.py); speed and memory do not depend on their values. Rows are
instruction-shaped, or with --length all of one length. `--layers` and `--tiny` shrink a shape.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import mixtures

import engine

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5_text", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
    "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
SINKS: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
    "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 201088,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 1024,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("hybrid", "sinks"))
    parser.add_argument("--alone", action="store_true", help="one row a forward")
    parser.add_argument("--bare", action="store_true", help="without sinks")
    parser.add_argument("--layers", type=int, default=0, help="instead of the shape's own number")
    parser.add_argument("--length", type=int, default=0, help="of every row, instead of instruction-shaped rows")
    parser.add_argument("--examples", type=int, default=32, help="rows of one step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one more setting of lorafit")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    own = {name: getattr(options, name) for name in ("arm", "alone", "bare", "layers", "length", "examples", "set")}
    with tempfile.TemporaryDirectory() as folder:
        make_base(options, Path(folder) / "base")
        print(json.dumps(own | run(options, Path(folder) / "base")))


def make_base(options: argparse.Namespace, folder: Path) -> None:
    """Write config.json, a tokenizer, and the header of a safetensors file without data."""
    import torch
    from transformers import AutoConfig

    shape = dict(HYBRID if options.arm == "hybrid" else SINKS)
    shape |= {key: value for key, value in TINY.items() if options.tiny and key in shape}
    shape |= {"num_hidden_layers": options.layers} if options.layers else {}
    config = AutoConfig.for_model(**shape, **TOKENS, max_position_embeddings=8192, dtype=torch.bfloat16)
    mixtures.write_base(config, folder)


def run(options: argparse.Namespace, base: Path) -> dict[str, object]:
    """Return the figures of one training run through lorafit.train."""
    import torch
    import transformers

    import lorafit.api.build_model as build_model

    seen: dict[str, object] = {"kernels": [name for name in ("fla", "causal_conv1d") if importlib.util.find_spec(name)]}
    mixtures.note_row_mode(seen, alone=options.alone)
    build_model.load_backbone = lambda config, **_: (drop_sinks if options.bare else unchanged)(
        mixtures.random_backbone(str(base))
    )
    warm = 2
    seen["transformers"], seen["torch"] = transformers.__version__, torch.__version__
    found = engine.run_lorafit(
        argparse.Namespace(
            folder=str(base), work="dense" if options.length else "real", length=options.length, warm=warm,
            rows=options.examples if options.length else options.examples * (warm + options.steps), vram=0,
            examples=options.examples, steps=options.steps, targets="qv", compute="fp32" if options.tiny else "bf16",
            deterministic=False, dropout=0.0, activations="auto", profile="", set=options.set,
        )
    )  # fmt: skip
    return seen | found


def unchanged(model: Any) -> Any:
    return model


def drop_sinks(model: Any) -> Any:
    """Let packed attention ignore the sinks, as a shape without them would, and give them no weight in rows alone."""
    import torch
    from transformers import AttentionInterface

    from lorafit.engine.attention.packed import PACKED, packed_attention

    def bare(*inputs: Any, s_aux: Any = None, **options: Any) -> Any:
        return packed_attention(*inputs, **options)

    AttentionInterface.register(PACKED, bare)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-100.0)
    return model


if __name__ == "__main__":
    main()
