"""Where the memory goes, per setting: the picture of docs/concepts/memory.md, from the plan itself. No torch, no GPU.

    python bench/memory_picture.py docs/concepts/memory.svg     # or a .png, to look at

One bar a setting: a Llama-3.1-8B shape in NF4, r = 16 on q and v, steps of 4 × 2,048 tokens on an H200. The same
numbers give the same file. Measured peaks are typed in below, with what they were measured under.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.memory import DataStats, PlanInputs
from lorafit.memory.execution_plan import ExecutionPlan, memory_of, plan_execution
from lorafit.memory.footprint import Execution
from lorafit.shapes import ModelShape

GIB = 1 << 30
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
ROWS = DataStats(rows=256, tokens=256 * 2048, supervised_tokens=256 * 2048, longest=2048, mean_tokens=2048.0)
PEERS = Execution(fused=False, loss="all", wide_stream=True)
OUTSIDE = "CUDA context"  # no budget of torch's allocator counts it


@dataclass(frozen=True, slots=True)
class Setting:
    """One bar: a policy, and what one H200 showed with it: the peak, and the budget that it was held to (GiB)."""

    policy: str
    measured: float | None = None
    budget: float | None = None
    peers: bool = False

    @property
    def label(self) -> str:
        """The policy as it is written by hand, in two lines where it is long."""
        if self.peers:
            return "transformers + peft + bitsandbytes,\ngradient checkpointing"
        return self.policy.replace(",embeddings", ",\nembeddings").replace(
            "recompute_mlp_layers=32,micro", "recompute_mlp_layers=32,\nmicro"
        )


# 2026-11-22, one H200, torch 2.11, bytes reserved; the peers' figure is of bytes allocated
SETTINGS = (
    Setting("recompute", 24.5, peers=True),
    Setting("keep", 31.4),
    Setting("offloaded_layers=9,host_embeddings=on", 23.5, 24),
    Setting("recompute_mlp_layers=32", 17.9),
    Setting("recompute_layers=32"),
    Setting("recompute_mlp_layers=30,offloaded_layers=30,host_embeddings=on", 7.74, 8),
    Setting("recompute_mlp_layers=32,offloaded_layers=32,host_embeddings=on"),
    Setting("micro_tokens=2048"),
    Setting("recompute_mlp_layers=32,micro_tokens=2048"),
    Setting("recompute_mlp_layers=32,offloaded_layers=32,host_embeddings=on,micro_tokens=2048"),
)
GAPS = (1, 7)  # before these bars a little room: the peers, then 8,192 tokens at once, then 2,048

# neighbours differ in grey and to colour-blind eyes too; hatched where lightness alone would not do
_FILL = {"edgecolor": "white", "linewidth": 0.5}
PARTS: dict[str, dict[str, Any]] = {
    "base in NF4": {"facecolor": "#1f2d4d", **_FILL},
    "embeddings": {"facecolor": "#4f6a94", **_FILL},
    "lm_head": {"facecolor": "#7a90b5", **_FILL},
    "adapters, gradients, optimizer": {"facecolor": "#000000", **_FILL},
    "kept activations": {"facecolor": "#f6bd4f", **_FILL},
    "in flight to or from the host": {
        "facecolor": "#fdf0d0",
        "hatch": "////",
        "edgecolor": "#a86c00",
        "linewidth": 0.5,
    },
    "one layer's backward": {"facecolor": "#8c2d5a", **_FILL},
    "the loss": {"facecolor": "#e3a9c6", "hatch": "xx", **_FILL},
    "lost between blocks": {"facecolor": "#dddddd", **_FILL},
}
ON_HOST: dict[str, Any] = {"facecolor": "white", "hatch": "\\\\\\\\", "edgecolor": "#555555", "linewidth": 0.5}


@dataclass(frozen=True, slots=True)
class Bar:
    """What one setting takes at its peak, in GiB by part, and on the host."""

    setting: Setting
    parts: dict[str, float]
    host: float

    @property
    def total(self) -> float:
        """The estimate of bytes reserved."""
        return sum(self.parts.values())


def bar_of(setting: Setting) -> Bar:
    """The plan's estimate for `setting`, less the CUDA context."""
    shape, gpu = ModelShape.from_config(LLAMA_8B, "Llama-3.1-8B"), hardware_named("H200")
    config = RunConfig(
        max_length=8192, examples_per_step=4, dropout=0.0, optimizer="adamw", memory_policy=setting.policy
    )
    execution = PEERS if setting.peers else None
    inputs = PlanInputs(config, ROWS, shape, gpu)
    plan = plan_execution(inputs, execution)
    estimate = memory_of(plan, inputs, execution)
    sizes = {part.name: part.size_bytes for part in estimate.components if part.name != OUTSIDE}
    head = shape.head_parameters * (4 if setting.peers else 2)
    parts = _parts(sizes, head, plan)
    assert sum(parts.values()) == sum(sizes.values()), "a component of the estimate has no place in the picture"
    return Bar(setting, {name: size / GIB for name, size in parts.items()}, estimate.host_bytes / GIB)


def _parts(sizes: dict[str, int], head: int, plan: ExecutionPlan) -> dict[str, int]:
    at_loss = plan.peak.working_bytes == plan.costs.loss_bytes
    working = sizes["loss or one layer's backward"]
    return {
        "base in NF4": sizes["base, linear layers"] + sizes["norms, biases"],
        "embeddings": sizes["embeddings and lm_head"] - head,
        "lm_head": head,
        "adapters, gradients, optimizer": sum(
            sizes[name] for name in ("adapters", "adapter gradients", "optimizer state")
        ),
        "kept activations": sizes["activations"],
        "in flight to or from the host": sizes.get("activations in flight", 0),
        "one layer's backward": 0 if at_loss else working,
        "the loss": working if at_loss else 0,
        "lost between blocks": sizes["fragmentation"],
    }


def draw(bars: list[Bar]) -> Figure:
    """The bars, first one on top."""
    figure = Figure(figsize=(10.4, 7.9), layout="constrained")
    axes = figure.add_subplot()
    places = [place + 0.45 * sum(place >= gap for gap in GAPS) for place in range(len(bars))]
    for place, bar in zip(places, bars, strict=True):
        _draw_bar(axes, place, bar)
    axes.set_yticks(places, [bar.setting.label for bar in bars], fontsize=9)
    axes.set_ylim(places[-1] + 0.75, -0.6)
    axes.set_xlim(0, 44)
    axes.set_xticks(range(0, 37, 4))
    axes.set_xlabel(
        "GiB on the GPU at the peak, as planned (hatched below a bar: GiB of host memory)",
        loc="left",
        fontsize=9,
    )
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for place, words in zip((places[GAPS[0]], places[GAPS[1]]), ("micro-batches of 8,192 tokens", "of 2,048 tokens")):
        axes.annotate(words, (43.8, place - 0.66), ha="right", va="top", fontsize=9, style="italic", color="#444444")
        axes.axhline(place - 0.72, color="#bbbbbb", linewidth=0.7)
    figure.legend(handles=_legend(axes), loc="outside upper left", ncols=4, fontsize=8.5, frameon=False)
    return figure


def _draw_bar(axes: Any, place: float, bar: Bar) -> None:
    left = 0.0
    for name, style in PARTS.items():
        axes.barh(place, bar.parts[name], left=left, height=0.5, **style)
        left += bar.parts[name]
    if bar.host:
        axes.barh(place + 0.37, bar.host, height=0.18, **ON_HOST)
        axes.annotate(f"{bar.host:.1f}", (bar.host + 0.3, place + 0.38), va="center", fontsize=7.5, color="#444444")
    setting, words = bar.setting, f"{bar.total:.1f}"
    if setting.budget:
        axes.plot([setting.budget] * 2, [place - 0.36, place + 0.27], color="black", linewidth=1.4)
    if setting.measured:
        hollow = "white" if setting.peers else "black"
        axes.plot(setting.measured, place, "o", markersize=7, color=hollow, markeredgecolor="black", markeredgewidth=1)
        axes.plot(setting.measured, place, "o", markersize=9, color="none", markeredgecolor="white", markeredgewidth=1)
        words += f", measured {setting.measured:.3g}"
    right = max(left, setting.measured or 0, setting.budget or 0)
    axes.annotate(words, (right + 0.5, place), va="center", fontsize=9)


def _legend(axes: Any) -> list[Any]:
    handles: list[Any] = [
        Patch(**style, label=name) for name, style in (*PARTS.items(), ("pinned in host memory", ON_HOST))
    ]
    options = {"color": "none", "markeredgecolor": "black", "linestyle": ""}
    handles += axes.plot([], [], marker="o", markersize=7, **{**options, "color": "black"}, label="measured peak")
    handles += axes.plot(
        [], [], marker="|", markersize=11, markeredgewidth=1.4, **options, label="budget it was held to"
    )
    return handles


def save(bars: list[Bar], path: Path) -> None:
    """Write the picture, without the moment it was made; an SVG says its numbers in its description."""
    numbers = "; ".join(f"{bar.setting.policy}: {bar.total:.2f} GiB, host {bar.host:.2f}" for bar in bars)
    told = (
        {"Date": None, "Creator": None, "Title": "Where the memory goes", "Description": numbers}
        if path.suffix == ".svg"
        else {}
    )
    with matplotlib.rc_context({"svg.hashsalt": "lorafit", "hatch.linewidth": 0.8, "font.family": "DejaVu Sans"}):
        draw(bars).savefig(path, dpi=110, metadata=told)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    save([bar_of(setting) for setting in SETTINGS], Path(sys.argv[1]))
