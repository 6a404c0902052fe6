"""`train`: the run of the README."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from dpfunc.cli.words import add_json


def add_to(verbs: Any) -> None:
    parser = verbs.add_parser("train", help="train on handwritten digits (needs dpfunc[train])")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--epsilon", type=float, default=3.0, help="target (default 3)")
    parser.add_argument("--delta", type=float, default=1e-5, help="(default 1e-5)")
    parser.add_argument("--seed", type=int, help="reproducible, and not private")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder; an unfinished run in it goes on (default run, or run-2, ... beside finished ones)",
    )
    add_json(parser)
    parser.set_defaults(verb=_train)


def _train(options: argparse.Namespace) -> None:
    from dpfunc import digits, plots, random
    from dpfunc.training import Saving, fit
    from dpfunc.training.keyfile import read_key
    from dpfunc.training.run import KEY

    out = options.out or _next_folder()
    data, settings = digits.load(options.data), digits.SETTINGS[options.data]
    mechanism = digits.mechanism_for(data, settings, options.epsilon, options.delta)
    key = read_key(out / KEY) if (out / KEY).exists() else random.key(options.seed)
    module = digits.Network(data.train.images.shape[-1], settings, random.split(key)[0])
    train_step, params = digits.pair(module, settings, mechanism)

    def evaluate(state: Any) -> dict[str, float]:
        return {
            "validation accuracy": digits.accuracy(module, state.optimizer.average, data.validation)
        }

    fitted = fit(
        train_step,
        params,
        tuple(data.train),
        mechanism,
        key,
        num_steps=settings.num_steps,
        delta=options.delta,
        evaluate=evaluate,
        saving=Saving(
            folder=out,
            every=20,
            unit=digits.UNIT,
            note="" if options.seed is None else "the key comes from a seed",
        ),
    )
    if fitted.stopped == "interrupted":
        print(
            f"Stopped after step {int(fitted.state.step)}; the same command goes on.",
            file=sys.stderr,
        )
    average = fitted.state.optimizer.average
    statement = digits.statement_for(fitted.log, options.delta, seeded=options.seed is not None)
    digits.save(out, average, statement)
    plots.draw_run(
        out / "run.PRIVATE.png",
        steps=[int(row["step"]) for row in fitted.history],
        accuracy=[row["validation accuracy"] for row in fitted.history],
        epsilon=[row["epsilon"] for row in fitted.history],
        norms=digits.gradient_norms(module, data, average, settings.l2_clip_norm),
        l2_clip_norm=settings.l2_clip_norm,
        title=f"{options.data}: epsilon {fitted.epsilon:.3g} at delta {options.delta:g}",
    )
    accuracy = digits.accuracy(module, average, data.test)
    if options.json:
        answer = {
            "test_accuracy": accuracy,
            "epsilon": fitted.epsilon,
            "delta": options.delta,
            "num_steps": int(fitted.state.step),
            "stopped": fitted.stopped,
            "folder": str(out),
        }
        print(json.dumps(answer))
        return
    print(f"test accuracy {accuracy:.4f}\n")
    print(statement)
    print(f"\nwrote {', '.join(sorted(p.name for p in out.iterdir()))} to {out}/")


def _next_folder() -> Path:
    """`run`, or the first of run-2, run-3, ... that holds no finished run."""
    from dpfunc.accounting import read_run
    from dpfunc.training.run import LOG

    for number in count(1):
        folder = Path("run" if number == 1 else f"run-{number}")
        if not (folder / LOG).exists() or not read_run(folder / LOG).closed:
            return folder
    raise AssertionError
