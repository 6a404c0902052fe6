"""Seconds a Poisson batch: `dpfunc.poisson_indices` against one draw for every example, and Opacus.

    ./dev bench sampling [--device cuda]

The expected batch is 256 at every size of the data, so the ideal does not depend on the size. Drawing
for every example is O(N) time and memory; above 10**8 examples it is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import interleaved, machine, write
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from dpfunc import poisson_indices, random

EXPECTED = 256
SIZES = (10**3, 10**5, 10**7, 10**9)
LARGEST_BY_EXAMPLE = 10**8


def contestants(size: int, device: str) -> dict[str, Callable[[], Any]]:
    key, prob, steps = random.key(0, device=device), EXPECTED / size, iter(range(10**9))
    found: dict[str, Callable[[], Any]] = {
        "dpfunc.poisson_indices": lambda: poisson_indices(
            size, key, next(steps), sampling_prob=prob
        ),
    }
    if size <= LARGEST_BY_EXAMPLE:
        found["torch.rand < q"] = lambda: (torch.rand(size, device=device) < prob).nonzero()
        opacus = iter(
            UniformWithReplacementSampler(num_samples=size, sample_rate=prob, steps=10**9)
        )
        found["opacus sampler"] = lambda: next(opacus)
    return found


def check(size: int, device: str) -> None:
    """The same law: sizes of 200 batches within five standard errors of the mean, no index twice."""
    for name, draw in contestants(size, device).items():
        batches = [torch.as_tensor(draw()).flatten() for _ in range(200)]
        mean = sum(map(len, batches)) / len(batches)
        assert abs(mean - EXPECTED) < 5 * (EXPECTED / len(batches)) ** 0.5, (name, mean)
        assert all(len(batch.unique()) == len(batch) for batch in batches), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    torch.set_num_threads(1)
    check(10**5, device)
    rows = [
        {"size": n, "seconds": interleaved(contestants(n, device), repeats=15, device=device)}
        for n in SIZES
    ]
    path = write(f"sampling-{device}", {"machine": machine(device), "rows": rows})
    print(f"wrote {path}; ./dev bench report draws it")


if __name__ == "__main__":
    main()
