"""The command line. Only `train` imports torch.

It ends with 0 when it worked, 1 when it could not (a file, a damaged log, an extra that is missing), 2
when the words were wrong, and `verify` with 3 for a log that is not as it was written. Errors are one
line on stderr; answers are on stdout, with --json as one JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dpfunc import __version__
from dpfunc.cli import numbers, pictures, records, training
from dpfunc.cli.words import CouldNotError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; 0 when it worked, 1 when it could not, 2 when the words were wrong, 3 as it says."""
    try:
        options = _parser().parse_args(arguments)
        return options.verb(options) or 0
    except (ValueError, TypeError) as error:
        return _said(error, 2)
    except (CouldNotError, OSError, ModuleNotFoundError) as error:
        return _said(error, 1)


def _said(error: Exception, code: int) -> int:
    print(f"dpfunc: {' '.join(str(error).split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, but that wrong words are an error of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dpfunc", description="Differentially private training.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for room in (numbers, records, pictures, training):
        room.add_to(verbs)
    return parser
