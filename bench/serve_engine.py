"""The builtin engine's decoding speed, in this process and without HTTP. `python bench/serve.py engine BASE OUT`."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from lorafit.backbone import base_fingerprint, load_backbone
from lorafit.config import RunConfig, resolve
from lorafit.data import Template, TextTokenizer
from lorafit.methods.lora import attach, save_adapter
from lorafit.runs import RunDir, RunFingerprint, RunIdentity, adapter_hashes, held_settings
from lorafit.serve.adapters import ServedBase
from lorafit.serve.decoding import Generation, Sampling
from lorafit.serve.decoding.batch import Part, Tail
from lorafit.serve.engines import BuiltinEngine, Limits

NO_WATCH = SimpleNamespace(on_admitted=lambda each: None, on_step=lambda *sizes: None, on_crash=lambda error: None)
WORDS = range(3, 590)
"""Ids of the prompts."""


def make_runs(base: str, root: Path, count: int, rank: int, targets: str) -> list[Path]:
    """Write run directories over `base` whose adapters are drawn, not trained."""
    flags = {"base": base, "dropout": 0.0, "rank": rank, "alpha": 2.0 * rank, "targets": targets}
    config = resolve(flags=flags).config
    first = RunDir(root / "tenant-0")
    first.path.mkdir(parents=True)
    first.write_config(config, dict.fromkeys(RunConfig.model_fields, "default"))
    template = Template.for_tokenizer(TextTokenizer.from_base(base))
    template.save(first.template)
    first.samples.write_text("")
    live = attach(load_backbone(config), config)
    save_adapter(live, first.adapter, config, base_name=base)
    del live
    gc.collect()
    torch.cuda.empty_cache()
    print_json(reserved_gib=round(torch.cuda.memory_reserved() / 2**30, 1) if torch.cuda.is_available() else 0)
    fingerprint = RunFingerprint("", "", template.sha256, base_fingerprint(Path(base)), held_settings(config))
    runs = [first, *(RunDir(shutil.copytree(first.path, root / f"tenant-{number}")) for number in range(1, count))]
    for number, run in enumerate(runs):
        _draw(run.adapter / "adapter_model.safetensors", number)
        run.seal_files(RunIdentity("id", fingerprint, adapter=adapter_hashes(run.adapter)))
    return [run.path for run in runs]


def _draw(path: Path, seed: int) -> None:
    generator, tensors = torch.Generator().manual_seed(seed), load_file(path)
    for name, tensor in sorted(tensors.items()):
        scale = 0.01 if "lora_B" in name else tensor.shape[1] ** -0.5
        tensors[name] = (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


@contextmanager
def engine_over(runs: list[Path], *, streams: int, loaded: int, length: int, dense: bool) -> Iterator[BuiltinEngine]:
    """Yield an engine with `loaded` of the runs' adapters, each proved."""
    limits = Limits(max_num_seqs=streams, max_model_len=length, max_loras=loaded, dense=dense)
    began = time.perf_counter()
    engine = BuiltinEngine(ServedBase.of_run(runs[0]), "base", [runs[0].parent], limits, NO_WATCH)
    started_s = time.perf_counter() - began
    loads = []
    for run in runs[:loaded]:
        began = time.perf_counter()
        engine.add_adapter(run.name, run)
        loads.append(1e3 * (time.perf_counter() - began))
    print_json(
        started_s=round(started_s, 1), dense=engine.is_dense, floor=engine.proof.floor, adapters=loaded,
        load_and_prove_ms=round(statistics.median(loads)),
    )  # fmt: skip
    try:
        yield engine
    finally:
        engine.stop(0)
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def measure(engine: BuiltinEngine, *, streams: int, adapters: int, prompt: int, new: int) -> dict[str, object]:
    """Answer `streams` requests that arrive at once, with `adapters` adapters in turn; 0 asks the base."""
    generator = torch.Generator().manual_seed(streams + adapters)
    prompts = torch.randint(WORDS.start, WORDS.stop, (streams, prompt), generator=generator).tolist()
    names = sorted(engine.pool.names())[:adapters]
    times: list[list[float]] = [[] for _ in prompts]
    left = threading.Semaphore(0)
    generations = []
    for number, ids in enumerate(prompts):
        version = engine.pool.pin(names[number % adapters]) if adapters else None
        generations.append(
            Generation(
                ids, version, Sampling(), new, frozenset(),
                on_token=lambda chosen, mine=times[number]: mine.append(time.perf_counter()),
                on_end=lambda reason, error: left.release(),
            )
        )  # fmt: skip
    began = time.perf_counter()
    for generation in generations:
        engine.scheduler.submit(generation)
    for _ in generations:
        left.acquire()
    elapsed_s = time.perf_counter() - began
    for generation in generations:
        if generation.version is not None:
            engine.pool.unpin(generation.version)
    texts = sha256(json.dumps([each.ids for each in generations]).encode()).hexdigest()[:12]
    tokens = sum(map(len, times))
    assert tokens == streams * new, (tokens, streams * new)
    first = sorted(1e3 * (each[0] - began) for each in times)
    between = sorted(1e3 * (b - a) for each in times for a, b in itertools.pairwise(each))
    decoding_s = max(each[-1] for each in times) - max(each[0] for each in times)
    after = sum(moment > max(each[0] for each in times) for each in times for moment in each)
    return {
        "streams": streams, "adapters": adapters, "dense": engine.is_dense, "tok_s": round(tokens / elapsed_s),
        "decode_tok_s": round(after / decoding_s) if decoding_s else 0, "ttft_ms": quantiles(first),
        "between_ms": quantiles(between), "replays": engine.decoder.replays, "texts": texts,
    }  # fmt: skip


def write_profile(engine: BuiltinEngine, path: Path, prompt: int) -> None:
    """Write the kernels of three decoding steps of 64 texts, the slowest first, and the time of a step alone."""
    decoder, slots = engine.decoder, min(64, engine.limits.max_num_seqs)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]

    def steps(count: int) -> float:
        rows = {slot: (7, prompt + 1, slot % (len(engine.pool.names()) + 1)) for slot in range(slots)}
        began = time.perf_counter()
        for _ in range(count):
            decoder.decode(rows).likeliest()
        return 1e3 * (time.perf_counter() - began) / count

    def work() -> str:
        steps(3)
        alone_ms = steps(10)
        with torch.profiler.profile(activities=kinds) as profile:
            steps(3)
        order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
        return f"{alone_ms:.2f} ms a step of {slots} texts, dense {engine.is_dense}\n{table}\n"

    with path.open("a") as file:
        file.write(engine.scheduler.call(work).result())


def quantiles(ordered: list[float]) -> dict[str, float]:
    """Return median and 99th percentile of ordered values."""
    if not ordered:
        return {}
    return {
        "p50": round(ordered[len(ordered) // 2], 2),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }


def batch_kl(engine: BuiltinEngine, prompts: list[list[int]]) -> float:
    """Return the mean KL of next tokens in one batch of texts, each with its adapter, from the same texts alone."""
    decoder = engine.decoder

    def next_tokens(slots: list[int]) -> torch.Tensor:
        parts = [Part(slot, prompts[slot], 0, slot % 2) for slot in slots]
        decoder.prefill(parts)
        step = decoder.decode({part.slot: (7, len(part.ids), part.adapter) for part in parts})
        return step.logits[slots].log_softmax(-1)

    def work() -> float:
        every = list(range(len(prompts)))
        together = next_tokens(every)
        alone = torch.cat([next_tokens([slot]) for slot in every])
        return float(torch.nn.functional.kl_div(together, alone, reduction="batchmean", log_target=True))

    return engine.scheduler.call(work).result()


def cold_load_ms(engine: BuiltinEngine) -> float:
    """Return the milliseconds in which an adapter is read from disk and checked against its hash."""
    version = next(iter(engine.pool.names().values()))
    began = time.perf_counter()
    version.read(engine.decoder.model)
    return round(1e3 * (time.perf_counter() - began), 1)


def print_json(**fields: object) -> None:
    """Print one line of results."""
    print(json.dumps(fields), flush=True)


def prove(base: str) -> None:
    """Print the KL of the slots, eager and as CUDA graphs, beside what rounding to bf16 does to the base itself."""
    import torch.nn.functional as F

    from lorafit.backbone import computing_in
    from lorafit.serve.decoding import BatchDecoder

    config = resolve(flags={"base": base}).config
    decoder = BatchDecoder(load_backbone(config, exact=True), slots=8, positions=256, adapters=1)
    ids = torch.randint(WORDS.start, WORDS.stop, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    tail = Tail(ids, 24)
    with torch.inference_mode(), computing_in(decoder.model, torch.float32):
        [exact] = decoder.plain_log_probs([tail])
    [plain] = decoder.plain_log_probs([tail])

    def distance(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        kl = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        most = (found - wanted).abs().max()
        print_json(base=base, what=name, mean_kl=float(kl.mean()), max_kl=float(kl.max()), max_log_prob=float(most))

    distance("floor: rounded to the compute dtype, against fp32", plain, exact)
    graphs = decoder._graphs
    for fused in (False, True):
        if fused:
            decoder.fuse()
        for eager in (True, False) if decoder.device.type == "cuda" else (True,):
            graphs.failed = eager
            kind = f"slots, {'eager' if eager else 'graphs'}, {'fused' if fused else 'the family own code'}"
            distance(kind, decoder.slot_log_probs(tail, 3, 0), plain)
    distance("spare slot, prompts only", decoder.spare_log_probs([tail], 0)[0], plain)


def run_engine(base: str, out: Path, *, counts: list[int], streams: list[int], rank: int, targets: str,
               prompt: int, new: int, dense: list[bool]) -> None:  # fmt: skip
    """Measure every combination, and write a line each to OUT/engine.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    root = out / "runs"
    shutil.rmtree(root, ignore_errors=True)
    runs = make_runs(base, root, max(counts), rank, targets)
    length = 1 << (prompt + new - 1).bit_length()
    try:
        with (out / "engine.jsonl").open("a") as file:
            for keep in dense:
                for loaded in sorted(set(counts)):
                    with engine_over(runs, streams=max(streams), loaded=loaded, length=length, dense=keep) as engine:
                        for many in streams if loaded == min(counts) else [64]:
                            for adapters in [0, loaded] if loaded == min(counts) else [loaded]:
                                sizes = {"streams": min(many, max(streams)), "adapters": adapters, "prompt": prompt}
                                measure(engine, **sizes, new=new)  # records the graphs
                                line = measure(engine, **sizes, new=new)
                                line |= {"targets": targets, "rank": rank, "loaded": loaded}
                                print_json(**line)
                                file.write(json.dumps(line) + "\n")
                                file.flush()
                        generator = torch.Generator().manual_seed(1)
                        asked = torch.randint(WORDS.start, WORDS.stop, (8, prompt), generator=generator).tolist()
                        write_profile(engine, out / "profile.txt", prompt)
                        many = min(8, max(streams))
                        print_json(
                            batch_kl=batch_kl(engine, asked[:many]), floor=engine.proof.floor,
                            cold_load_ms=cold_load_ms(engine), failed_graphs=engine.decoder.graphs_failed,
                        )  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)
