"""`statement`, `verify`: what a log claims, and whether it is as it was written."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dpfunc.accounting import RunLog, Statement, verify_log
from dpfunc.cli import words

_RELEASED = "every noisy gradient, and so all parameters"
FAILED = 3


def add_to(verbs: Any) -> None:
    claim = verbs.add_parser("statement", help="the privacy statement of a log file, or of numbers")
    words.add_log(claim)
    claim.add_argument("--delta", type=float, required=True)
    claim.add_argument("--released", default=_RELEASED, help="what leaves the run")
    claim.add_argument("--unit", help="what one example is (default: what the log says)")
    claim.add_argument(
        "--caveat", action="append", default=[], help="a sentence on what is not covered"
    )
    words.add_accountant(claim)
    form = claim.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    words.add_json(form)
    claim.set_defaults(verb=_statement)

    whole = verbs.add_parser(
        "verify",
        help="whether a log file is as it was written",
        description="Ends with 0 for a log that is as it was written, and with 3 for one that is not.",
    )
    whole.add_argument("log", type=Path, help="a log.jsonl")
    whole.add_argument("--head", help="the SHA-256 of its last line, as a statement holds it")
    words.add_json(whole)
    whole.set_defaults(verb=_verify)


def _statement(options: argparse.Namespace) -> None:
    found = words.run_or_numbers(options)
    said: dict[str, Any] = {
        "delta": options.delta,
        "released": options.released,
        "accountant": options.accountant,
        "caveats": tuple(options.caveat),
    }
    if isinstance(found, RunLog):
        if options.unit is not None:
            found = found._replace(header=replace(found.header, unit=options.unit))
        statement = Statement.of(found, **said)
    else:
        statement = Statement(log=found, unit=options.unit or "example", **said)
    if options.json:
        print(statement.to_json())
    else:
        print(statement.to_markdown() if options.markdown else statement)


def _verify(options: argparse.Namespace) -> int:
    found = verify_log(options.log, head=options.head)
    print(json.dumps({"whole": bool(found), **asdict(found)}) if options.json else found)
    return 0 if found else FAILED
