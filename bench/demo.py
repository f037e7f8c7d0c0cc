"""The demo's nine figures: three tasks, three seeds, one after another. `python bench/demo.py OUT`; prints a table."""

import json
import subprocess
import sys
from pathlib import Path

TASKS, SEEDS = ("orders", "dates", "tickets"), (0, 1, 2)


def run(task: str, seed: int, folder: Path) -> dict:
    """One demo in a process of its own, as a user would start it."""
    command = [sys.executable, "-m", "lorafit", "demo", "--json", "--task", task, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--out", str(folder / f"{task}-{seed}")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{task} {seed}: {done.stderr}")
    return json.loads(done.stdout)


def floors(verification: dict) -> float:
    """The KL that the verdict stands on, in noise floors: onto the original base that to the adapter over it."""
    exact, floor = verification.get("exact"), verification.get("exact_floor")
    return exact["median_kl"] / floor["median_kl"] if exact and floor else verification["floors"]


def main() -> None:
    folder = Path(sys.argv[1])
    measured = "exact match before | after | merged onto | merge KL / floor | training | whole demo | tokens/s"
    print(f"| task | seed | {measured} |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for task in TASKS:
        for seed in SEEDS:
            got = run(task, seed, folder)
            proof = got["verification"]
            share = f"{got['exact_match_before']:.1%} | {got['exact_match_after']:.1%}"
            times = f"{got['train_s']:.0f} s | {got['total_s']:.0f} s | {got['tokens_per_s']:,}"
            print(f"| {task} | {seed} | {share} | {proof['onto']} | {floors(proof):.1f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
