"""What the verbs share: a log given as a file or as numbers, an accountant, an answer."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dpfunc.accounting import ACCOUNTANTS, CLAIMS, RunLog, read_run
from dpfunc.events import MECHANISMS, RELATIONS, SAMPLINGS, AnyLog, StepEvent

_NUMBERS = ("noise_multiplier", "sampling_prob", "num_steps")
_KINDS = {"mechanism": MECHANISMS, "sampling": SAMPLINGS, "relation": RELATIONS}


class CouldNotError(Exception):
    """The words were right, and yet it could not be done."""


def add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--noise-multiplier", type=float, help="noise scale over sensitivity")
    add_run(parser)


def add_run(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """All of a run but its noise."""
    parser.add_argument(
        "--sampling-prob", type=float, required=required, help="of an example, in a step"
    )
    parser.add_argument("--num-steps", type=int, required=required)
    for name, options in _KINDS.items():
        parser.add_argument(f"--{name}", choices=options, help=f"(default {_default(name)})")


def add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log", type=Path, help="a log.jsonl; instead of the three numbers")
    add_numbers(parser)


def add_accountant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accountant", choices=ACCOUNTANTS, default=ACCOUNTANTS[0])


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_or_numbers(options: argparse.Namespace) -> RunLog | AnyLog:
    """What a log file says, or the log of the numbers."""
    given = [name for name in (*_NUMBERS, *_KINDS) if getattr(options, name) is not None]
    if options.log is not None and not given:
        try:
            return read_run(options.log)
        except ValueError as error:
            raise CouldNotError(str(error)) from error
    if options.log is not None or not {*_NUMBERS} <= {*given}:
        raise ValueError(
            "Expected either --log, or all of --noise-multiplier, --sampling-prob and --num-steps."
        )
    return (
        StepEvent(
            noise_multiplier=options.noise_multiplier,
            sampling_prob=options.sampling_prob,
            count=options.num_steps,
            **kinds(options),
        ),
    )


def log_of(options: argparse.Namespace) -> AnyLog:
    found = run_or_numbers(options)
    return found.log if isinstance(found, RunLog) else found


def kinds(options: argparse.Namespace) -> dict[str, Any]:
    """Those of mechanism, sampling and relation that were said."""
    return {name: value for name in _KINDS if (value := getattr(options, name)) is not None}


def answer(options: argparse.Namespace, shown: str, **values: float) -> None:
    """Print an answer, with what the accountant's number is."""
    claim = CLAIMS[options.accountant]
    if options.json:
        # JSON has no infinity.
        known = {n: "inf" if value == math.inf else value for n, value in values.items()}
        print(json.dumps({**known, "accountant": options.accountant, "claim": claim}))
    else:
        print(shown + ("" if claim == CLAIMS["pld"] else f"  ({claim})"))


def _default(name: str) -> str:
    return StepEvent.__dataclass_fields__[name].default
