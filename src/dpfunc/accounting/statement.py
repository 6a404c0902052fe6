"""The privacy claim in words: what was run, what is released, and what it rests on."""

from __future__ import annotations

import decimal
import json
import math
import textwrap
from dataclasses import dataclass
from typing import Any

from dpfunc import _checks
from dpfunc.accounting.claims import Claim, otherwise
from dpfunc.accounting.epsilon import CLAIMS, epsilon
from dpfunc.accounting.steplog import RunLog, event_to_json
from dpfunc.events import AnyLog, Log

_NEIGHBOURS = {
    "add_or_remove_one": "add or remove one {unit}",
    "replace_one": "replace one {unit} by another",
    "zero_out": "replace one {unit} by a blank one",
}
_ASSUMES = {
    "poisson": "each batch is a Poisson sample: every {unit} in or out independently",
    "truncated_poisson": "each batch is a Poisson sample cut to a public size",
    "fixed_without_replacement": "each batch is a uniform subset of a fixed size",
    "none": "every step reads all the data",
}
_OPEN = (
    "the log file is open: it may count steps that were not run, and nothing shows that no line is "
    "missing at its end."
)
_UNCHAINED = "the log file is of format 1: nothing shows that it is as it was written."


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A privacy claim, made of a log and the choices that the log does not hold.

    Args:
        log: what ran.
        delta: in (0, 1).
        accountant: as for `epsilon`.
        unit: what one example is, without an article: whose presence is protected.
        released: what leaves the run.
        caveats: sentences on what is not covered.
        num_attempts: how many attempts the log counts, each of them whole.
        head: the hash of the log file's last line, in hex, by which `verify_log` knows it; "" if unknown.

    Guarantees:
        `epsilon` is computed from the log, never typed, and so are the claims for other ways of
        drawing batches, which are those that the accountant has a bound for.
        `str()`, `to_markdown()` and `to_json()` say the same.
        No key, no batch size that was realised and no size of the data set is in it.

    Raises:
        ValueError: as `epsilon`.

    Source: Ponomareva et al. 2023, arXiv:2303.00654, section 5.3, on what to report.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> round(Statement(log=log, delta=1e-5, released="the parameters").epsilon, 4)
    1.8282
    """

    log: AnyLog
    delta: float
    released: str
    accountant: str = "pld"
    unit: str = "example"
    caveats: tuple[str, ...] = ()
    num_attempts: int = 1
    head: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", Log(self.log))
        _checks.open_unit(delta=self.delta)
        _checks.integer(at_least=0, num_attempts=self.num_attempts)
        if isinstance(self.caveats, str):
            raise TypeError("Expected caveats to be a tuple of sentences, got one string.")

    @classmethod
    def of(
        cls,
        run: RunLog,
        *,
        delta: float,
        released: str,
        accountant: str = "pld",
        caveats: tuple[str, ...] = (),
    ) -> Statement:
        """The statement of a log file, which knows its unit, its attempts and its head."""
        if not run.closed:
            caveats = (*caveats, _OPEN if run.head else _UNCHAINED)
        return cls(
            log=run.log,
            delta=delta,
            released=released,
            accountant=accountant,
            unit=run.header.unit,
            caveats=caveats,
            num_attempts=len(run.attempts),
            head=run.head,
        )

    @property
    def epsilon(self) -> float:
        return epsilon(self.log, delta=self.delta, accountant=self.accountant)

    @property
    def otherwise(self) -> tuple[Claim, ...]:
        """What could be claimed had the batches been drawn in other ways."""
        return otherwise(
            self.log,
            delta=self.delta,
            accountant=self.accountant,
            num_attempts=max(1, self.num_attempts),
        )

    def __str__(self) -> str:
        return "\n".join(
            textwrap.fill(f"{name + ':':<13}{text}", width=96, subsequent_indent=" " * 13)
            for name, text in self._rows()
        )

    def to_markdown(self) -> str:
        """The statement as a table in Markdown, under a heading."""
        rows = [(name, " ".join(text.replace("|", "\\|").split())) for name, text in self._rows()]
        lines = ["# Privacy statement", "", "| | |", "|---|---|"]
        return "\n".join([*lines, *(f"| {name} | {text} |" for name, text in rows), ""])

    def to_json(self) -> str:
        """The statement as one JSON object, its events included. Infinity is "inf"."""
        whole: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        whole["log"] = [event_to_json(event) for event in self.log]
        whole["epsilon"] = _number(self.epsilon)
        whole["claim"] = CLAIMS[self.accountant]
        whole["otherwise"] = [
            {
                **claim._asdict(),
                "assumes": self._filled(claim.assumes),
                "epsilon": _number(claim.epsilon),
            }
            for claim in self.otherwise
        ]
        return json.dumps(whole, allow_nan=False)

    def _rows(self) -> list[tuple[str, str]]:
        relations = sorted({event.relation for event in self.log})
        samplings = sorted({event.sampling for event in self.log})
        neighbours = ", or ".join(_NEIGHBOURS[r] for r in relations) or "any two data sets"
        assumes = "; ".join(_ASSUMES[s] for s in samplings) or "nothing was drawn"
        rows = [
            ("Guarantee", f"{self._pair(self.epsilon)}-differential privacy"),
            ("Neighbours", self._filled(neighbours)),
            ("Unit", f"one {self.unit}"),
            ("Released", self.released),
            ("What ran", _what_ran(self.log)),
            ("Assumes", self._filled(assumes)),
        ]
        for claim in self.otherwise:
            changed = "" if [claim.relation] == relations else f", to {_NEIGHBOURS[claim.relation]}"
            text = f"{self._pair(claim.epsilon)} if instead {claim.assumes}{changed}"
            rows.append(("Otherwise", self._filled(text)))
        rows.append(("Accountant", f"{self.accountant}, {CLAIMS[self.accountant]}"))
        if self.num_attempts > 1:
            rows.append(("Attempts", f"{self.num_attempts}, all of them counted whole"))
        if self.head:
            rows.append(("Log", f"ends in SHA-256 {self.head}"))
        return [*rows, *(("Not covered", caveat) for caveat in self.caveats)]

    def _pair(self, epsilon: float) -> str:
        return f"({round_up(epsilon, 4)}, {self.delta:g})"

    def _filled(self, text: str) -> str:
        return text.replace("{unit}", self.unit)


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value  # JSON has no infinity


def _what_ran(log: AnyLog) -> str:
    shown = [
        f"{event.count} steps with {event.mechanism} noise of multiplier {event.noise_multiplier:.5g} "
        f"at sampling probability {event.sampling_prob:.5g}"
        for event in log[:3]
    ]
    if len(log) > 3:
        rest = sum(event.count for event in log[3:])
        shown.append(f"{rest} more steps of {len(log) - 3} kinds, in the log")
    return "; ".join(shown) or "nothing"


def round_up(value: float, digits: int) -> str:
    """A number with so many digits, never below the number itself: a claim rounds to its safe side.

    >>> round_up(2.111432, 4), round_up(3.0, 4), round_up(float("inf"), 4)
    ('2.112', '3', 'inf')
    """
    return _rounded(value, digits, decimal.ROUND_CEILING)


def round_down(value: float, digits: int) -> str:
    """A number with so many digits, never above the number itself.

    >>> round_down(2.111432, 4), round_down(3.0, 4)
    ('2.111', '3')
    """
    return _rounded(value, digits, decimal.ROUND_FLOOR)


def _rounded(value: float, digits: int, rounding: str) -> str:
    if math.isinf(value):
        return "inf"
    context = decimal.Context(prec=digits, rounding=rounding)
    return f"{float(context.create_decimal(repr(float(value)))):.{digits}g}"
