"""What the benchmarks share: interleaved medians, the machine in words, results as JSON."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contestants: dict[str, Callable[[], Any]], *, repeats: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Time every contestant once in each of `repeats` rounds: median and spread, in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            synchronize(device)
            begin = time.perf_counter()
            result = run()
            synchronize(device)
            times[name].append(time.perf_counter() - begin)
            del result
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t), "repeats": repeats}
        for name, t in times.items()
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, str]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = f"{len(lines)} x {lines[0].split(':')[1].strip()}" if lines else model
    packages = ("torch", "numpy", "cryptography", "opacus", "opake-engine")
    known = {d.metadata["Name"] for d in distributions()}
    return {
        "cpu": model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in packages if name in known},
    }


def write(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
