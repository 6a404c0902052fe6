"""Normals per second: `dpfunc.random.normal` against `torch.randn`, eager and compiled.

    ./dev bench noise [--device cuda]

The ideal on CPU is the keystream alone (OpenSSL's ChaCha20, 4 bytes for each normal), which is
timed too. Every contestant makes n float32 normals into memory of its own.
"""

from __future__ import annotations

import argparse

import torch
from harness import interleaved, machine, write

from dpfunc import random

SIZES = (10**4, 10**6, 10**8)


def check(key: torch.Tensor) -> None:
    """Eager and compiled draw the same bits, with the moments of a normal law."""
    eager = random.normal(key, (10**6,))
    compiled = torch.compile(lambda k: random.normal(k, (10**6,)), fullgraph=True)(key)
    assert eager.equal(compiled)
    assert abs(float(eager.mean())) < 0.005
    assert abs(float(eager.std()) - 1) < 0.005


def measure(size: int, device: str, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    key = random.key(0, device=device)
    ours = torch.compile(lambda k: random.normal(k, (size,)), fullgraph=True)
    theirs = torch.compile(lambda: torch.randn(size, device=device), fullgraph=True)
    contestants = {
        "torch.randn eager": lambda: torch.randn(size, device=device),
        "dpfunc eager": lambda: random.normal(key, (size,)),
        "torch.randn compiled": theirs,
        "dpfunc compiled": lambda: ours(key),
        "dpfunc keystream alone": lambda: torch.ops.dpfunc.words(
            key[None], 0, key.new_zeros(1), 0, size
        ),
    }
    repeats = 7 if size >= 10**8 else 31
    return {
        "size": size,
        "threads": threads,
        "seconds": interleaved(contestants, repeats=repeats, device=device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    check(random.key(0, device=options.device))
    cores = torch.get_num_threads()
    rows = [
        measure(size, options.device, threads) for threads in sorted({1, cores}) for size in SIZES
    ]
    path = write(f"noise-{options.device}", {"machine": machine(options.device), "rows": rows})
    print(f"wrote {path}; ./dev bench report draws it")


if __name__ == "__main__":
    main()
