"""Seconds a Poisson batch: `dpfunc.poisson_indices` against one draw for every example, and Opacus.

    ./dev bench sampling [--device cuda]

The expected batch is 256 at every size of the data, so the ideal does not depend on the size. Drawing
for every example is O(N) time and memory; above 10**8 examples it is left out. Loading is timed too: a
whole padded `Batch` from a memory-mapped file of 64 bytes a row, to 64 GB. The file is one hole, so
this is the cost of the code and of the page faults, without a disk's.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleaved, machine, write
from opacus.utils.uniform_sampler import UniformWithReplacementSampler

from dpfunc import DPSGD, poisson_batches, poisson_indices, random

EXPECTED = 256
WIDTH = 16
SIZES = (10**3, 10**5, 10**7, 10**9)
LARGEST_BY_EXAMPLE = 10**8


def rows_on_disk(size: int, directory: Path) -> np.memmap:
    return np.memmap(directory / "rows", dtype=np.float32, mode="w+", shape=(size, WIDTH))


def contestants(size: int, device: str, rows: np.memmap) -> dict[str, Callable[[], Any]]:
    key, prob, steps = random.key(0, device=device), EXPECTED / size, iter(range(10**9))
    mechanism = DPSGD(
        clipping=1.0, noise_multiplier=1.0, sampling_prob=prob, expected_batch_size=EXPECTED
    )
    batches = poisson_batches(rows, key, mechanism, num_steps=10**9)
    found: dict[str, Callable[[], Any]] = {
        "dpfunc.poisson_indices": lambda: poisson_indices(
            size, key, next(steps), sampling_prob=prob
        ),
        "dpfunc.poisson_batches of a file": lambda: next(batches),
    }
    if size <= LARGEST_BY_EXAMPLE:
        found["torch.rand < q"] = lambda: (torch.rand(size, device=device) < prob).nonzero()
        opacus = iter(
            UniformWithReplacementSampler(num_samples=size, sample_rate=prob, steps=10**9)
        )
        found["opacus sampler"] = lambda: next(opacus)
    return found


def check(size: int, device: str, directory: Path) -> None:
    """The same law: sizes of 200 batches within five standard errors of the mean, no index twice."""
    rows = rows_on_disk(size, directory)
    rows[:] = np.arange(size, dtype=np.float32)[:, None]
    for name, draw in contestants(size, device, rows).items():
        batches = [of_batch(draw()) for _ in range(200)]
        mean = sum(map(len, batches)) / len(batches)
        assert abs(mean - EXPECTED) < 5 * (EXPECTED / len(batches)) ** 0.5, (name, mean)
        assert all(len(batch.unique()) == len(batch) for batch in batches), name


def of_batch(drawn: Any) -> torch.Tensor:
    """The indices drawn: in a file whose rows are full of their own index, those of its rows."""
    if hasattr(drawn, "mask"):
        return drawn.data[drawn.mask, 0]
    return torch.as_tensor(drawn).flatten()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        check(10**5, device, Path(name))
        for size in SIZES:
            found = contestants(size, device, rows_on_disk(size, Path(name)))
            seconds = interleaved(found, repeats=15, device=device)
            rows.append({"size": size, "seconds": seconds})
    path = write(f"sampling-{device}", {"machine": machine(device), "rows": rows})
    print(f"wrote {path}; ./dev bench report draws it")


if __name__ == "__main__":
    main()
