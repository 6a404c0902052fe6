"""`epsilon`, `delta`, `calibrate`: from numbers or a log to a number."""

from __future__ import annotations

import argparse
from typing import Any

from dpfunc.accounting import (
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibrate_sampling_prob,
    delta,
    epsilon,
)
from dpfunc.accounting.statement import round_down, round_up
from dpfunc.cli import words

_DIGITS = 6
_SEARCHES = {
    "noise_multiplier": (calibrate_noise_multiplier, lambda value: round_up(value, _DIGITS)),
    "sampling_prob": (calibrate_sampling_prob, lambda value: round_down(value, _DIGITS)),
    "num_steps": (calibrate_num_steps, str),
}


def add_to(verbs: Any) -> None:
    spent = verbs.add_parser("epsilon", help="epsilon of a log file, or of numbers")
    words.add_log(spent)
    spent.add_argument("--delta", type=float, required=True)
    spent.set_defaults(verb=_epsilon)

    failing = verbs.add_parser("delta", help="delta of a log file, or of numbers")
    words.add_log(failing)
    failing.add_argument("--epsilon", type=float, required=True)
    failing.set_defaults(verb=_delta)

    fitting = verbs.add_parser(
        "calibrate",
        help="the noise multiplier, steps or sampling probability for a target epsilon",
        description="Give two of --noise-multiplier, --sampling-prob and --num-steps for the third.",
    )
    fitting.add_argument("--target-epsilon", type=float, required=True)
    fitting.add_argument("--delta", type=float, required=True)
    words.add_numbers(fitting)
    fitting.set_defaults(verb=_calibrate)

    for parser in (spent, failing, fitting):
        words.add_accountant(parser)
        words.add_json(parser)


def _epsilon(options: argparse.Namespace) -> None:
    value = epsilon(words.log_of(options), delta=options.delta, accountant=options.accountant)
    words.answer(options, round_up(value, _DIGITS), epsilon=value, delta=options.delta)


def _delta(options: argparse.Namespace) -> None:
    value = delta(words.log_of(options), epsilon=options.epsilon, accountant=options.accountant)
    words.answer(options, round_up(value, _DIGITS), delta=value, epsilon=options.epsilon)


def _calibrate(options: argparse.Namespace) -> None:
    known = {name: getattr(options, name) for name in _SEARCHES}
    missing = [name for name, value in known.items() if value is None]
    if len(missing) != 1:
        raise ValueError(
            "Expected two of --noise-multiplier, --sampling-prob and --num-steps, to find the third."
        )
    search, shown = _SEARCHES[missing[0]]
    value = search(
        target_epsilon=options.target_epsilon,
        delta=options.delta,
        accountant=options.accountant,
        **{name: number for name, number in known.items() if number is not None},
        **words.kinds(options),
    )
    words.answer(options, shown(value), **{missing[0]: value}, delta=options.delta)
