"""Seconds a training step: dpfunc against the non-private step, Opacus and Opake.

    ./dev bench steps [--models mlp,vgg] [--threads 1,2] [--device cuda] [--repeats 15] [--only REGEX]

A step is the clipped sum, noise, division and SGD update on a batch that is in memory already. Before
anything is timed, every private contestant's clipped sum must equal that of a loop over examples;
about half of them are clipped. glibc is told to keep freed memory, which helps those most who store
all per-example gradients. Results are merged into those of earlier runs, model by model; with
--only, contestant by contestant. Opake takes part where it can be imported.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from graphs import graphs
from harness import RESULTS, interleaved, machine, synchronize, write
from models import MODELS, Model
from peers import TOLERANCE, Contestant, Reference, contestants, reference

SLOW_SECONDS = 5.0
SLOW_REPEATS = 3


def keep_memory() -> None:
    """Have glibc keep what is freed. Returned and faulted in anew at every step, the per-example
    gradients of those who store them cost several times their arithmetic in a virtual machine.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def prepare(make: Callable[[], Contestant], correct: Reference) -> tuple[Contestant, float]:
    """A contestant that computes the right thing and has taken its first steps; seconds of one."""
    contestant = make()
    if contestant.clipped_sum is not None:
        error = correct.error(contestant.clipped_sum())
        if not error < TOLERANCE:
            raise ArithmeticError(f"clipped sum is wrong by {error:.1e} of its norm")
    device = "cuda" if next(iter(correct.clipped_sum.values())).is_cuda else "cpu"
    contestant.step()  # compiles
    synchronize(device)
    begin = time.perf_counter()
    contestant.step()
    synchronize(device)
    return contestant, time.perf_counter() - begin


def measure(
    model: Model, correct: Reference, threads: int, device: str, repeats: int, only: str
) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    fast: dict[str, Callable[[], Any]] = {}
    slow: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    for name, make in contestants(model, correct.clip_norm).items():
        if not re.search(only, name):
            continue
        begin = time.perf_counter()
        try:
            contestant, seconds = prepare(make, correct)
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
            print(f"  {name}: absent, {absent[name][:200]}", flush=True)
            continue
        ready = time.perf_counter() - begin
        print(f"  {name}: {seconds:.4f} s a step, ready in {ready:.0f} s", flush=True)
        (slow if seconds > SLOW_SECONDS else fast)[name] = contestant.step
    return {
        "model": model.name,
        "threads": threads,
        "parameters": sum(s.numel() for s in correct.clipped_sum.values()),
        "batch": len(model.inputs),
        "clip_norm": correct.clip_norm,
        "seconds": {
            **interleaved(fast, repeats=repeats, device=device),
            **interleaved(slow, repeats=min(repeats, SLOW_REPEATS), device=device),
        },
        "absent": absent,
    }


def merged(old: list[dict[str, Any]], new: dict[str, Any], partial: bool) -> list[dict[str, Any]]:
    """`new` in the place of the row of the same model and threads, or laid over it."""
    places = [(row["model"], row["threads"]) for row in old]
    if (place := (new["model"], new["threads"])) not in places:
        return [*old, new]
    before = old[places.index(place)]
    if partial:
        for name in new["seconds"] | new["absent"]:
            before["seconds"].pop(name, None)
            before["absent"].pop(name, None)
        new = {
            **new,
            "seconds": before["seconds"] | new["seconds"],
            "absent": before["absent"] | new["absent"],
        }
    return [new if row is before else row for row in old]


def main() -> None:
    cores = torch.get_num_threads()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default=",".join(str(t) for t in sorted({1, cores})))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="regular expression on contestants")
    options = parser.parse_args()
    for message in ("Full backward hook is firing", "In CPU autocast"):  # Opacus, at each step
        warnings.filterwarnings("ignore", message=message)
    keep_memory()
    name = f"steps-{options.device}"
    path = RESULTS / f"{name}.json"
    for chosen in options.models.split(","):
        model = MODELS[chosen]().to(options.device)
        correct = reference(model)
        traced = graphs(model, correct.clip_norm)
        print(f"{chosen}: {traced}", flush=True)
        for threads in map(int, options.threads.split(",")):
            print(f"{chosen}, {threads} thread(s)", flush=True)
            row = measure(model, correct, threads, options.device, options.repeats, options.only)
            row["graph"] = traced
            result = json.loads(path.read_text()) if path.exists() else {"rows": []}
            rows = merged(result["rows"], row, bool(options.only))
            # After every row, so that a run that is stopped keeps what it has.
            write(name, {"machine": machine(options.device), "rows": rows})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
