"""The privacy claim in words: what was run, what is released, and what it rests on."""

from __future__ import annotations

import decimal
import json
import math
import textwrap
from dataclasses import dataclass

from dpfunc import _checks
from dpfunc.accounting.epsilon import CLAIMS, epsilon
from dpfunc.accounting.steplog import event_to_json
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

    Guarantees:
        `epsilon` is computed from the log, never typed.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", Log(self.log))
        _checks.open_unit(delta=self.delta)
        if isinstance(self.caveats, str):
            raise TypeError("Expected caveats to be a tuple of sentences, got one string.")

    @property
    def epsilon(self) -> float:
        return epsilon(self.log, delta=self.delta, accountant=self.accountant)

    def __str__(self) -> str:
        relations = sorted({event.relation for event in self.log})
        samplings = sorted({event.sampling for event in self.log})
        neighbours = ", or ".join(_NEIGHBOURS[r] for r in relations) or "any two data sets"
        assumes = "; ".join(_ASSUMES[s] for s in samplings) or "nothing was drawn"
        rows = [
            ("Guarantee", f"({round_up(self.epsilon, 4)}, {self.delta:g})-differential privacy"),
            ("Neighbours", neighbours.format(unit=self.unit)),
            ("Unit", f"one {self.unit}"),
            ("Released", self.released),
            ("What ran", _what_ran(self.log)),
            ("Assumes", assumes.format(unit=self.unit)),
            ("Accountant", f"{self.accountant}, {CLAIMS[self.accountant]}"),
            *(("Not covered", caveat) for caveat in self.caveats),
        ]
        return "\n".join(
            textwrap.fill(f"{name + ':':<13}{text}", width=96, subsequent_indent=" " * 13)
            for name, text in rows
        )

    def to_json(self) -> str:
        """The statement as one JSON object, its events included."""
        whole = {name: getattr(self, name) for name in self.__dataclass_fields__}
        whole |= {"log": [event_to_json(event) for event in self.log]}
        whole |= {"epsilon": "inf" if math.isinf(self.epsilon) else self.epsilon}
        return json.dumps(whole, allow_nan=False)


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
    if math.isinf(value):
        return "inf"
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(repr(float(value)))):.{digits}g}"
