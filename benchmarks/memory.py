"""Peak memory of a training step, over what model and batch take: dpfunc, non-private, Opacus.

    ./dev bench memory [--models mlp,vgg,transformer] [--device cuda] [--only REGEX]

Every contestant has a process of its own. On CPU it is the kernel's high-water mark of resident
memory, reset after two warm steps of one thread, with a malloc that maps and unmaps every block of 128 KiB or more:
the mark is what is alive, and not how a heap happens to break up. On CUDA it is that of torch's
allocator. Ratios are to the non-private step that takes least.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine, write
from models import MODELS
from peers import Contestant, contestants, reference

CHUNKS = {"mlp": 32, "vgg": 8, "transformer": 2}
CONTESTANTS = "^(non-private|dpfunc (auto|two_pass)|opacus (hooks|ghost))"
STEPS = 3
MAPPED = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
    return int(line.split()[1]) * 1024


def peak(step: Callable[[], Any], device: str) -> int:
    """Bytes that the steps need at most, over what is held between them."""
    step()
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before


def makers(name: str, device: str) -> dict[str, Callable[[], Contestant]]:
    """By name, how to make each; two chunk sizes: none and a smaller one."""
    model = MODELS[name]().to(device)
    # Of one example: the clip norm changes no memory, and the reference would leave its own behind.
    few = model._replace(inputs=model.inputs[:1], targets=model.targets[:1])
    clip_norm = reference(few).clip_norm
    every = {**contestants(model, clip_norm), **contestants(model, clip_norm, CHUNKS[name])}
    return {name: make for name, make in every.items() if re.search(CONTESTANTS, name)}


def worker(model: str, contestant: str, device: str) -> None:
    torch.set_num_threads(1)  # a second has buffers of its own, which come and go
    try:
        print(peak(makers(model, device)[contestant]().step, device))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))


def measure(model: str, device: str, only: str) -> dict[str, Any]:
    bytes_: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name in makers(model, device):
        if not re.search(only, name):
            continue
        command = [sys.executable, __file__, "--device", device, "--worker", model, name]
        run = subprocess.run(
            command, env=MAPPED, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        answer = json.loads(run.stdout.splitlines()[-1]) if run.stdout else f"exit {run.returncode}"
        if isinstance(answer, int):
            bytes_[name] = answer
        else:
            absent[name] = answer
        print(f"{model}, {name}: {answer}", flush=True)
    return {"model": model, "batch": len(MODELS[model]().inputs), "bytes": bytes_, "absent": absent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(CHUNKS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", help="regular expression on contestants")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "CONTESTANT"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, each step
    if options.worker:
        model, contestant = options.worker
        return worker(model, contestant, options.device)
    name = f"memory-{options.device}"
    path = RESULTS / f"{name}.json"
    rows = (
        {row["model"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    )
    for chosen in options.models.split(","):
        row = measure(chosen, options.device, options.only)
        if options.only and (before := rows.get(chosen)):
            for part in ("bytes", "absent"):
                kept = {n: v for n, v in before[part].items() if not re.search(options.only, n)}
                row[part] = kept | row[part]
        plain = [b for n, b in row["bytes"].items() if n.startswith("non-private")]
        row["ratio"] = {n: b / min(plain) for n, b in row["bytes"].items()} if plain else {}
        rows[chosen] = row
        write(name, {"machine": machine(options.device), "rows": list(rows.values())})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
