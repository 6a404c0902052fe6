"""`plot`: pictures of a log, or of what a run would need."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dpfunc.cli import words


def add_to(verbs: Any) -> None:
    parser = verbs.add_parser("plot", help="a picture (needs dpfunc[plots])")
    pictures = parser.add_subparsers(required=True, metavar="PICTURE")

    profile = pictures.add_parser("profile", help="delta over epsilon")
    profile.set_defaults(verb=_profile)

    errors = pictures.add_parser("trade-off", help="the errors that any attack must make")
    errors.set_defaults(verb=_trade_off)

    budget = pictures.add_parser("budget", help="epsilon over steps, and where it passes a budget")
    budget.add_argument("--target-epsilon", type=float, help="the budget")
    budget.set_defaults(verb=_budget)

    planning = pictures.add_parser("planning", help="the noise a run needs, over target epsilon")
    words.add_run(planning, required=True)
    planning.set_defaults(verb=_planning)

    for picture in (profile, errors, budget):
        words.add_log(picture)
    for picture in (budget, planning):
        picture.add_argument("--delta", type=float, required=True)
        words.add_accountant(picture)
    for picture in (profile, errors, budget, planning):
        picture.add_argument("--title", default="", help="one line above")
        picture.add_argument("--out", type=Path, required=True, help="its ending says the format")
        words.add_json(picture)


def _profile(options: argparse.Namespace) -> None:
    from dpfunc import plots

    plots.draw_profile(options.out, words.log_of(options), title=options.title)
    _wrote(options)


def _trade_off(options: argparse.Namespace) -> None:
    from dpfunc import plots

    plots.draw_trade_off(options.out, words.log_of(options), title=options.title)
    _wrote(options)


def _budget(options: argparse.Namespace) -> None:
    from dpfunc import plots

    plots.draw_budget(
        options.out,
        words.log_of(options),
        delta=options.delta,
        target_epsilon=options.target_epsilon,
        accountant=options.accountant,
        title=options.title,
    )
    _wrote(options)


def _planning(options: argparse.Namespace) -> None:
    from dpfunc import plots

    plots.draw_planning(
        options.out,
        sampling_prob=options.sampling_prob,
        num_steps=options.num_steps,
        delta=options.delta,
        accountant=options.accountant,
        title=options.title,
        **words.kinds(options),
    )
    _wrote(options)


def _wrote(options: argparse.Namespace) -> None:
    print(json.dumps({"wrote": str(options.out)}) if options.json else f"wrote {options.out}")
