"""`epsilon` and `delta`: one log, any accountant."""

from __future__ import annotations

from dpfunc import _checks
from dpfunc.accounting.rdp import rdp_delta, rdp_epsilon
from dpfunc.events import AnyLog, Log

ACCOUNTANTS = ("rdp",)


def epsilon(log: AnyLog, *, delta: float, accountant: str = "pld") -> float:
    """The epsilon that the log's releases together satisfy at `delta`.

    Args:
        log: what ran; `()` is nothing.
        delta: in (0, 1).
        accountant: "rdp". (The default, "pld", is not there yet, and the error says so.)

    Returns:
        A number in [0, inf]: an upper bound.

    Guarantees:
        Never negative and never NaN. An empty log, probability 0 and infinite noise give exactly 0;
        zero noise gives inf.
        `count=n` equals n copies; `log_a + log_b` composes; order does not matter.
        An event that the accountant has no bound for is refused.

    Raises:
        ValueError: delta out of range, an unknown accountant or event.

    Source: that of the accountant.

    >>> from dpfunc.events import StepEvent
    >>> log = (StepEvent(noise_multiplier=1.0, sampling_prob=0.01, count=1000),)
    >>> round(epsilon(log, delta=1e-5, accountant="rdp"), 2)
    2.1
    """
    _check_accountant(accountant)
    delta = _checks.open_unit("It is a probability of failure, say 1e-5.", delta=delta)
    return rdp_epsilon(Log(log), delta)[0]


def delta(log: AnyLog, *, epsilon: float, accountant: str = "pld") -> float:
    """The delta that the log's releases together satisfy at `epsilon`.

    Args:
        log: what ran; `()` is nothing.
        epsilon: finite, >= 0.
        accountant: "rdp".

    Returns:
        A number in [0, 1]: an upper bound.

    Guarantees:
        Falls with epsilon and with noise; rises with sampling and with steps.

    Raises:
        ValueError: epsilon out of range, an unknown accountant or event.

    Source: that of the accountant.

    >>> delta((), epsilon=1.0, accountant="rdp")
    0.0
    """
    _check_accountant(accountant)
    epsilon = _checks.finite_non_negative(epsilon=epsilon)
    return min(1.0, rdp_delta(Log(log), epsilon))


def _check_accountant(accountant: str) -> None:
    _checks.choice(ACCOUNTANTS, "Pass accountant='rdp'.", accountant=accountant)
