"""Walk every model family: plan, train, chat and merge on a tiny random base, compared with transformers and PEFT.

    PYTHONPATH=src:tests python bench/families.py [all | short | FAMILY …] [--keep RESULTS.jsonl] [--out TABLE.json]

Each family runs in a process of its own. Two runs of two steps are trained: `qv` with the planned quantization, and
`all-linear` on the base as stored. The second one's first loss is compared with the plain base's, each row alone, and
its merged model's logits with those of plain PEFT. `--keep` adds the results to a file, so that a walk may be made in
slices. `--out` renews the table that `lorafit models` prints, from the last result of each family in that file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.nn.functional import cross_entropy

import lorafit
from families_zoo import counted_here, families, small_config
from lorafit.api.observer import Observer
from lorafit.backbone import load_whole
from lorafit.backbone.architecture import auto_class
from lorafit.data import Rows, epoch_order
from lorafit.engine import RowMode
from lorafit.errors import LorafitError
from lorafit.methods.lora import Counts
from lorafit.shapes.tried_families import TriedFamily
from lorafit.training import TrainerCallback
from tiny_models import save_tokenizer

LIMIT_S = 150
STEP_ROWS = 4
SHORT = ("qwen3", "gemma4_text", "phi3", "deepseek_v3", "glm4_moe", "qwen3_5_text", "granitemoehybrid", "lfm2",
         "nemotron_h", "gpt_oss", "gpt2", "bloom", "mistral3", "qwen2_5_vl")  # fmt: skip
"""One family of each kind, which `short` stands for."""
TOLERANCE = 1e-3


class Watch(Observer):
    """Keep the row mode of a run."""

    mode: RowMode | None = None

    def on_model(self, counts: Counts, base: str, rows: RowMode) -> None:
        self.mode = rows


class FirstLoss(TrainerCallback):
    """Keep the loss of the first step."""

    loss = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if "loss" in (logs or {}) and self.loss != self.loss:
            self.loss = float(logs["loss"])


def walk(family: str, folder: Path) -> dict[str, Any]:
    """Return what works with `family`: a JSON-ready row of the table."""
    base, rows = folder / "base", folder / "rows.jsonl"
    found: dict[str, Any] = {"family": family}
    try:
        save_base(family, base)
    except Exception as error:  # noqa: BLE001 (whatever transformers raises, the family is not tried)
        reason = f"{type(error).__name__}: {one_line(error)}"
        return found | unbuilt(family, folder, reason, lacks_a_package=isinstance(error, ImportError))
    write_rows(rows)
    found |= {"built": True}
    for targets, more in (("qv", {}), ("all-linear", {"quantization": "none"})):
        found[targets] = one = attempt("plan", planned, rows, base, targets, more)
        if one["ok"]:
            found[targets] = one | attempt("train", trained, rows, base, folder / targets, targets, more)
    if found["qv"]["ok"]:
        found["chat"] = attempt("chat", answered, folder / "qv")
        found["merge"] = attempt("merge", merged, folder / "qv", "quantized")
    if found["all-linear"]["ok"]:
        found["merge_original"] = attempt("merge", merged, folder / "all-linear", "original")
        found["same"] = attempt("compare", compared, folder / "all-linear", base)
    return found


def unbuilt(family: str, folder: Path, reason: str, *, lacks_a_package: bool) -> dict[str, Any]:
    """Return why the family has no tiny base, or what `plan` says of its config.json if it refuses the family too."""
    if not lacks_a_package:
        (folder / "base").mkdir(exist_ok=True)
        small_config(family).to_json_file(folder / "base" / "config.json", use_diff=False)
        save_tokenizer(folder / "base")
        write_rows(folder / "rows.jsonl")
        answer = attempt("plan", planned, folder / "rows.jsonl", folder / "base", "qv", {})
        if "refused" in answer:
            return {"built": True, "qv": answer, "all-linear": answer}
    return {"built": False, "reason": reason}


def attempt(stage: str, call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the result of `call`, or the sentence or crash that ended it at `stage`."""
    try:
        return {"ok": True, **call(*arguments)}
    except LorafitError as error:
        return {"ok": False, "stage": stage, "refused": error.what}
    except Exception as error:  # noqa: BLE001 (a crash is a result)
        return {"ok": False, "stage": stage, "crashed": f"{type(error).__name__}: {one_line(error)}"}


def settings_of(base: Path, targets: str, more: dict[str, Any]) -> dict[str, Any]:
    run = {"holdout": 0.4, "max_steps": 2, "lr": 0.02, "dropout": 0.0, "examples_per_step": STEP_ROWS}
    return {"base": str(base), "targets": targets, **run, **more}


def planned(rows: Path, base: Path, targets: str, more: dict[str, Any]) -> dict[str, Any]:
    """Return what the plan says of the family. Raises LorafitError for a finding that stops the run."""
    plan = lorafit.plan(rows, **settings_of(base, targets, more)).plan
    if stops := [finding.message for finding in plan.findings if finding.severity == "error"]:
        raise LorafitError(stops[0])
    quantization = plan.inputs.config.quantization
    return {"targets": list(plan.targets), "predicted": plan.shape.unpacked, "quantization": quantization}


def trained(rows: Path, base: Path, out: Path, targets: str, more: dict[str, Any]) -> dict[str, Any]:
    """Train two steps, and return row mode and first loss; on a base as stored also its difference to the plain one."""
    watch, first = Watch(), FirstLoss()
    run = lorafit.train(rows, out=out, observer=watch, callbacks=[first], **settings_of(base, targets, more))
    assert watch.mode is not None
    layout = "packed" if watch.mode.is_packed else "padded" if watch.mode.is_padded else "alone"
    result = {"rows": layout, "reason": watch.mode.reason, "trainable": run.counts.trainable, "loss": first.loss}
    if more.get("quantization") == "none":
        plain = plain_loss(base, run.train_rows, run.resolved.config.seed)
        result["loss_difference"] = abs(first.loss / plain - 1)
    return result


def answered(run: Path) -> dict[str, Any]:
    return {"answer": lorafit.load(run).answer("abc", max_new_tokens=4)}


def plain_loss(base: Path, rows: Rows, seed: int) -> float:
    """Return the mean loss of the first step's supervised tokens in plain transformers, each row alone."""
    model, total, count = load_whole(base, dtype=torch.float32).eval(), 0.0, 0
    for row in epoch_order(len(rows), seed, 0)[:STEP_ROWS]:
        ids, mask = torch.from_numpy(rows.ids(int(row)).astype(np.int64)), torch.from_numpy(rows.mask(int(row)))
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += float(cross_entropy(logits[mask[1:]].float(), ids[1:][mask[1:]], reduction="sum"))
        count += int(mask[1:].sum())
    return total / count


def merged(run: Path, onto: Any) -> dict[str, Any]:
    result = lorafit.merge(run, onto=onto)
    if not result.passed:
        raise LorafitError(result.verification.reason)
    return {"floors": result.verification.floors, "folder": str(result.folder)}


def compared(run: Path, base: Path) -> dict[str, Any]:
    """Return the relative distance of the merged model's logits from those of plain PEFT."""
    ids = torch.arange(5, 45)[None]
    plain: Any = load_whole(base, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(plain, str(run / "adapter")).eval()
    (folder,) = (run / "exports").glob("merged-*")
    ours: Any = load_whole(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, got = (one(input_ids=ids, use_cache=False).logits for one in (tuned, ours))
        with tuned.disable_adapter():
            moved = float((tuned(input_ids=ids, use_cache=False).logits - wanted).norm() / wanted.norm())
    return {"logits_difference": float((got - wanted).norm() / wanted.norm()), "adapter_moves": moved}


def save_base(family: str, folder: Path) -> None:
    """Write a tiny random base of `family`, with a byte-level tokenizer."""
    torch.manual_seed(0)
    config = small_config(family)
    model = auto_class(config).from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
    model.float().save_pretrained(folder)
    save_tokenizer(folder)


def write_rows(path: Path) -> None:
    """Write thirty short rows of several lengths."""
    words = "amber birch cedar delta ember fjord grove heath inlet jetty".split()
    rows = [
        {"instruction": f"say {words[n % 10]} {n}", "response": " ".join(words[(n + k) % 10] for k in range(1 + n % 4))}
        for n in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def table_row(found: dict[str, Any]) -> TriedFamily:
    """Return the row of `lorafit models` for what `walk` found."""
    qv, every = found["qv"], found["all-linear"]
    stages = [qv, every, *(found.get(name, {}) for name in ("chat", "merge", "merge_original", "same"))]
    reasons = [one.get("refused") or one.get("crashed") for one in stages if not one.get("ok")]
    distances = every.get("loss_difference", 1.0), found.get("same", {}).get("logits_difference", 1.0)
    is_same = max(distances) <= TOLERANCE
    if not is_same:
        reasons.append(f"first loss or merged logits are {max(distances):.1e} from plain transformers and PEFT")
    trained = next((one for one in (qv, every) if one["ok"]), None)
    return TriedFamily(
        name=found["family"],
        rows="" if trained is None else trained["rows"],
        qv=tuple(qv["targets"]) if qv["ok"] else (),
        all_linear=tuple(every["targets"]) if every["ok"] else (),
        chat=bool(found.get("chat", {}).get("ok")),
        merge=all(found.get(name, {}).get("ok", False) for name in ("merge", "merge_original")),
        same=is_same,
        reason=next((str(reason) for reason in reasons if reason), ""),
    )


def write_table(tried: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the table of the families that transformers could build, with date and versions.

    Families of the table at `path` that were not tried again keep their rows.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = {row["name"]: row for row in known.get("families", ())}
    rows |= {row.name: asdict(row) for row in map(table_row, (found for found in tried if found["built"]))}
    unbuilt = known.get("unbuilt", {}) | {found["family"]: found["reason"] for found in tried if not found["built"]}
    content = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": {name: version(name) for name in ("transformers", "peft", "torch")},
        "families": [rows[name] for name in sorted(rows)],
        "unbuilt": {name: unbuilt[name] for name in sorted(unbuilt) if name not in rows},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _child(family: str, results: Any) -> None:
    subprocess.run = counted_here(subprocess.run)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lorafit-family-") as folder:
        results.put(walk(family, Path(folder)))


def walk_apart(family: str) -> dict[str, Any]:
    """Return the row of `family`, walked in a child process that may die or hang."""
    # a forked child cannot use a GPU that its parent has initialized
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(family, results))
    child.start()
    try:
        return dict(results.get(timeout=LIMIT_S))
    except Exception:  # noqa: BLE001 (queue.Empty)
        failed = {"ok": False, "stage": "walk", "crashed": f"no result in {LIMIT_S} s"}
        return {"family": family, "built": True, "qv": failed, "all-linear": failed}
    finally:
        child.kill()
        child.join()


def main() -> None:
    """Walk the families named, and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tried = _kept(options.keep)
    lists = {"all": families(), "short": list(SHORT)}
    for family in [one for named in options.families for one in lists.get(named, [named])]:
        tried[family] = walk_apart(family)
        line = json.dumps(tried[family])
        print(line, flush=True)
        if options.keep:
            with options.keep.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if options.out:
        write_table(list(tried.values()), options.out)


def _kept(path: Path | None) -> dict[str, Any]:
    """Return the last result of each family in the file at `path`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    return {row["family"]: row for row in map(json.loads, lines)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    main()
