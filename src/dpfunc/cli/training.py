"""`train`: the run of the README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_to(verbs: Any) -> None:
    parser = verbs.add_parser("train", help="train on handwritten digits (needs dpfunc[train])")
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--epsilon", type=float, default=3.0, help="target (default 3)")
    parser.add_argument("--delta", type=float, default=1e-5, help="(default 1e-5)")
    parser.add_argument("--seed", type=int, help="reproducible, and not private")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder (default run)")
    parser.set_defaults(verb=_train)


def _train(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from dpfunc import digits, plots, random

    options.out.mkdir(parents=True, exist_ok=True)
    data, settings = digits.load(options.data), digits.SETTINGS[options.data]
    mechanism = digits.mechanism_for(data, settings, options.epsilon, options.delta)
    key = random.key(options.seed)
    module = digits.Network(data.train.images.shape[-1], settings, random.split(key)[0])
    history: list[digits.Progress] = []
    with tqdm(total=settings.num_steps, unit="step", desc=f"training on {options.data}") as bar:
        try:
            for progress in digits.train(module, data, settings, mechanism, options.delta, key):
                history.append(progress)
                bar.update()
                bar.set_postfix_str(
                    f"epsilon {progress.epsilon:.3f}, validation accuracy {progress.accuracy:.3f}"
                )
        except KeyboardInterrupt:
            if not history:
                raise
            tqdm.write("Stopped: what ran so far is kept, and accounted.", file=sys.stderr)
    last = history[-1]
    statement = digits.statement_for(last.log, options.delta, seeded=options.seed is not None)
    digits.save(options.out, last.params, statement)
    plots.draw_run(
        options.out / "run.PRIVATE.png",
        steps=[progress.step for progress in history],
        accuracy=[progress.accuracy for progress in history],
        epsilon=[progress.epsilon for progress in history],
        norms=digits.gradient_norms(module, data, last.params, settings.l2_clip_norm),
        l2_clip_norm=settings.l2_clip_norm,
        title=f"{options.data}: epsilon {last.epsilon:.3g} at delta {options.delta:g}",
    )
    print(f"test accuracy {digits.accuracy(module, last.params, data.test):.4f}\n")
    print(statement)
    print(f"\nwrote {', '.join(sorted(p.name for p in options.out.iterdir()))} to {options.out}/")
