"""What a loop costs over its bare steps, what its files cost, and how fast the command line starts.

    ./dev bench training

The ideal is the bare step: `state, event = step(state, batch, key)` over batches that were drawn before.
Every contestant makes the same steps of the README's run; all are checked to end with the same bits.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, machine, write

from dpfunc import Saving, digits, fit, poisson_batches, random, train, trees

STEPS = 50
COMMAND = [
    "epsilon",
    "--noise-multiplier",
    "1",
    "--sampling-prob",
    "0.01",
    "--num-steps",
    "1000",
    "--delta",
    "1e-5",
]


def contestants(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    data, settings = digits.load("digits"), digits.SETTINGS["digits"]
    mechanism = digits.mechanism_for(data, settings, 3.0, 1e-5)
    key, split = random.key(0), tuple(data.train)
    module = digits.Network(8, settings, key)
    (init, step), params = digits.pair(module, settings, mechanism)
    drawn = list(poisson_batches(split, key, mechanism, num_steps=STEPS))
    runs = iter(range(10**6))

    def bare() -> Any:
        state = init(params)
        for batch in drawn:
            state, _ = step(state, batch, key)
        return state

    def drawing() -> Any:
        state = init(params)
        for batch in poisson_batches(split, key, mechanism, num_steps=STEPS):
            state, _ = step(state, batch, key)
        return state

    def training() -> Any:
        batches = poisson_batches(split, key, mechanism, num_steps=STEPS)
        *_, last = train(step, init(params), batches, key, mechanism)
        return last.state

    def fitting(every: int | None) -> Any:
        saving = every and Saving(folder=folder / str(next(runs)), every=every)
        return fit(
            (init, step),
            params,
            split,
            mechanism,
            key,
            num_steps=STEPS,
            delta=1e-5,
            saving=saving or None,
            progress=False,
        ).state

    return {
        "bare steps": bare,
        "steps and sampler": drawing,
        "train": training,
        "fit": lambda: fitting(None),
        "fit, saved every 50 steps": lambda: fitting(50),
        "fit, saved every 10 steps": lambda: fitting(10),
        "fit, saved every step": lambda: fitting(1),
    }


def check(runs: dict[str, Any]) -> None:
    states = [run() for run in runs.values()]
    for other in states[1:]:
        for a, b in zip(trees.leaves(states[0]), trees.leaves(other), strict=True):
            assert a.equal(b)


def start_up() -> dict[str, float]:
    """Wall seconds of whole processes, interleaved; the least of them is that of a quiet moment."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "python -c 'import numpy'": ["-c", "import numpy"],
        "python -c 'import scipy.special'": ["-c", "import scipy.special"],
        "dpfunc --version": ["-m", "dpfunc.cli", "--version"],
        "dpfunc epsilon": ["-m", "dpfunc.cli", *COMMAND],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(11):
        for name, arguments in commands.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times[name].append(time.perf_counter() - begin)
    return {name: min(each) for name, each in times.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = contestants(Path(folder))
        check(runs)
        seconds = interleaved(runs, repeats=9)
    result = {
        "machine": machine("cpu"),
        "threads": 1,
        "steps": STEPS,
        "seconds": seconds,
        "start_up": start_up(),
    }
    print(f"wrote {write('training-cpu', result)}; ./dev bench report draws it")


if __name__ == "__main__":
    main()
