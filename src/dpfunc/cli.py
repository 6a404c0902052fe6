"""The command line. The accounting verbs never import torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dpfunc import __version__
from dpfunc.accounting import (
    ACCOUNTANTS,
    CLAIMS,
    calibrate_noise_multiplier,
    epsilon,
    read_log,
)
from dpfunc.accounting.statement import round_up
from dpfunc.events import StepEvent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; 0 when it worked, 1 when it could not, 2 when the words were wrong."""
    options = _parser().parse_args(arguments)
    try:
        options.verb(options)
    except (ValueError, TypeError) as error:
        print(f"dpfunc: {error}", file=sys.stderr)
        return 2
    except (OSError, ModuleNotFoundError) as error:
        print(f"dpfunc: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dpfunc", description="Differentially private training.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    spent = verbs.add_parser("epsilon", help="epsilon of a log file, or of numbers")
    spent.add_argument("--log", type=Path, help="a log.jsonl; instead of the three numbers")
    spent.add_argument("--noise-multiplier", type=float)
    spent.add_argument("--sampling-prob", type=float)
    spent.add_argument("--num-steps", type=int)
    _add_accounting(spent)
    spent.set_defaults(verb=_epsilon)

    noise = verbs.add_parser("calibrate", help="the noise multiplier for a target epsilon")
    noise.add_argument("--target-epsilon", type=float, required=True)
    noise.add_argument("--sampling-prob", type=float, required=True)
    noise.add_argument("--num-steps", type=int, required=True)
    _add_accounting(noise)
    noise.set_defaults(verb=_calibrate)

    training = verbs.add_parser("train", help="train on handwritten digits (needs dpfunc[train])")
    training.add_argument("--data", choices=("digits", "mnist"), default="digits")
    training.add_argument("--epsilon", type=float, default=3.0, help="target (default 3)")
    training.add_argument("--delta", type=float, default=1e-5, help="(default 1e-5)")
    training.add_argument("--seed", type=int, help="reproducible, and not private")
    training.add_argument("--out", type=Path, default=Path("run"), help="folder (default run)")
    training.set_defaults(verb=_train)
    return parser


def _add_accounting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=float, required=True)
    parser.add_argument("--accountant", choices=ACCOUNTANTS, default=ACCOUNTANTS[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _epsilon(options: argparse.Namespace) -> None:
    numbers = (options.noise_multiplier, options.sampling_prob, options.num_steps)
    if (options.log is not None) == any(number is not None for number in numbers) or (
        options.log is None and None in numbers
    ):
        raise ValueError(
            "Expected either --log, or all of --noise-multiplier, --sampling-prob and --num-steps."
        )
    if options.log is not None:
        log = read_log(options.log)
    else:
        noise_multiplier, sampling_prob, num_steps = numbers
        log = (
            StepEvent(
                noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=num_steps
            ),
        )
    value = epsilon(log, delta=options.delta, accountant=options.accountant)
    _print(options, "epsilon", value)


def _calibrate(options: argparse.Namespace) -> None:
    value = calibrate_noise_multiplier(
        target_epsilon=options.target_epsilon,
        delta=options.delta,
        sampling_prob=options.sampling_prob,
        num_steps=options.num_steps,
        accountant=options.accountant,
    )
    _print(options, "noise_multiplier", value)


def _print(options: argparse.Namespace, name: str, value: float) -> None:
    claim = CLAIMS[options.accountant]
    if options.json:
        shown = value if value < float("inf") else "inf"  # JSON has no infinity
        answer = {name: shown, "delta": options.delta, "accountant": options.accountant}
        print(json.dumps(answer | {"claim": claim}))
    else:
        print(round_up(value, 6) + ("" if claim == CLAIMS["pld"] else f"  ({claim})"))


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


if __name__ == "__main__":
    sys.exit(main())
