"""One event: the record of a noisy release, and what an accountant knows it by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple

from dpfunc import _checks

MECHANISMS = ("gaussian", "laplace")
CUSTOM = "custom:"
"""What the name of a noise begins with that accountants know nothing of."""
SAMPLINGS = ("poisson", "truncated_poisson", "fixed_without_replacement", "none")
MAX_COUNT = 10**300  # a float can still hold it
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")


_LOADERS = (
    "A shuffled or sequential loader is none of them: its batches are not drawn independently, so that "
    "nothing is proved to be gained by sampling. What can be claimed: each example is in one batch "
    "an epoch, so an epoch is one event of sampling='none' with relation='zero_out'."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """`count` releases of a sum over a random batch, plus noise.

    For vectors v_i of norm at most C and a batch S drawn by `sampling`: the release is
    sum of v_i over S, plus noise of scale noise_multiplier * C in each coordinate.

    Args:
        noise_multiplier: noise scale over sensitivity, dimensionless, in [0, inf]. The scale is the
            standard deviation for "gaussian" (L2 norm), b for "laplace" (L1 norm).
        sampling_prob: probability that an example is in the batch, in [0, 1].
        count: how many such releases, a whole number in [0, 1e300].
        mechanism: "gaussian" or "laplace"; or "custom:NAME", which every accountant refuses until
            `account_as` says what it costs. Its noise_multiplier is finite.
        sampling: "poisson" (each example in or out independently), "truncated_poisson" (Poisson,
            then a uniform subset where the batch would exceed a public cap),
            "fixed_without_replacement", or "none" (every example, probability 1).
        relation: which data sets are neighbours: "add_or_remove_one", "replace_one", "zero_out".
        overflow_prob: for "truncated_poisson", an upper bound in [0, 1] on the probability that one
            draw exceeded the public cap and was cut. 0 there says that no bound was given: such an
            event can be logged, and is for an accountant to refuse. 0 for any other sampling.

    Guarantees:
        Numbers are plain floats and ints, and zero has no sign, so that equal events compare equal
        and write as the same JSON.

    Raises:
        ValueError, TypeError: a number that is NaN or out of range, an unknown name, sampling
            "none" with a probability other than 1, or an overflow_prob where nothing is cut.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> StepEvent(noise_multiplier=1.1, sampling_prob=0.01, count=1000).count
    1000
    """

    noise_multiplier: float
    sampling_prob: float
    count: int = 1
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    relation: str = "add_or_remove_one"
    overflow_prob: float = 0.0

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("noise_multiplier", _checks.non_negative(noise_multiplier=self.noise_multiplier) + 0.0)
        put("sampling_prob", _checks.probability(sampling_prob=self.sampling_prob) + 0.0)
        put("count", _checked_count(_checks.integer(at_least=0, count=self.count)))
        put("overflow_prob", _checks.probability(overflow_prob=self.overflow_prob) + 0.0)
        if check_noise(self.mechanism).startswith(CUSTOM):
            _checks.finite_non_negative(noise_multiplier=self.noise_multiplier)
        _checks.choice(SAMPLINGS, _LOADERS, sampling=self.sampling)
        _checks.choice(RELATIONS, relation=self.relation)
        if self.sampling == "none" and self.sampling_prob != 1.0:
            raise ValueError(
                f"Expected sampling_prob=1 with sampling='none', got {self.sampling_prob}. "
                "Say sampling='poisson' if batches are drawn."
            )
        if self.sampling != "truncated_poisson" and self.overflow_prob:
            raise ValueError(
                f"Expected overflow_prob=0 with sampling={self.sampling!r}, got {self.overflow_prob}. "
                "Only 'truncated_poisson' cuts a draw."
            )


def check_noise(mechanism: str) -> str:
    """The name of a noise: one that accountants know, or one of a user's own."""
    if isinstance(mechanism, str) and mechanism.startswith(CUSTOM) and mechanism != CUSTOM:
        return mechanism
    advice = "Noise of your own is named 'custom:NAME'."
    return _checks.choice(MECHANISMS, advice, mechanism=mechanism)


class Kind(NamedTuple):
    """All of an event but its numbers of every step, by which an accountant knows it or refuses it."""

    mechanism: str
    sampling: str
    relation: str
    overflow_prob: float


kind_of: Callable[[StepEvent], tuple[Any, ...]] = attrgetter(*Kind._fields)
"""The fields of the event's kind, in their order, as a plain tuple."""


def combined_noise_multiplier(*noise_multipliers: float) -> float:
    """The noise multiplier of several Gaussian queries on one draw, taken as the one query they are.

    Such queries are one event with this multiplier. Events of their own would stand for draws of
    their own, and under-report: two answers about one batch tell more about who is in it.

    Args:
        noise_multipliers: of each query, its standard deviation over its own L2 sensitivity, in
            [0, inf]; at least one.

    Returns:
        (sum of noise_multiplier ** -2) ** -1/2, in [0, inf].

    Guarantees:
        Never above the true value, and within a few units in its last place, over all of float64.
        One alone is returned as it is; 0 gives 0; inf adds nothing; their order does not matter.

    Raises:
        ValueError, TypeError: none at all, or one that is NaN or negative.

    Source: in units of their noise, stacked, they are one query of unit noise and of sensitivity
        sqrt(sum of noise_multiplier ** -2); Andrew et al. 2021, arXiv:1905.03871, for two.

    >>> combined_noise_multiplier(3.0, 4.0)
    2.4
    """
    known = sorted(_checks.non_negative(noise_multiplier=m) for m in noise_multipliers)
    if not known:
        raise TypeError("Expected at least one noise_multiplier, got none.")
    least, finite = known[0], [m for m in known if m < math.inf]
    if least == 0.0 or not finite:
        return least
    value = least / math.hypot(*(least / m for m in finite))
    total = sum(1 / Fraction(m) ** 2 for m in finite)
    while total * Fraction(value) ** 2 > 1:
        value = math.nextafter(value, 0.0)
    return value


def noise_multiplier_beside(*noise_multipliers: float, combined: float) -> float:
    """The noise multiplier of one more query on a draw, so that all of them together have `combined`.

    For the gradient beside telemetry or adaptive clipping: `combined` is what was calibrated.

    Args:
        noise_multipliers: of the other queries, in (combined, inf]; may be none.
        combined: what the event shall have, finite, > 0.

    Returns:
        (combined ** -2 - sum of noise_multiplier ** -2) ** -1/2.

    Guarantees:
        `combined_noise_multiplier` of it and the others is at least combined.

    Raises:
        ValueError, TypeError: the others alone already have a combined multiplier that is no larger.

    Source: that of `combined_noise_multiplier`; Andrew et al. 2021, arXiv:1905.03871, section 3.1.

    >>> noise_multiplier_beside(4.0, combined=2.4)
    3.0
    """
    combined = _checks.positive(combined=combined)
    others = [_checks.positive(noise_multiplier=m) for m in noise_multipliers if m != math.inf]
    left = 1 / Fraction(combined) ** 2 - sum(1 / Fraction(m) ** 2 for m in others)
    if left <= 0:
        raise ValueError(
            f"Expected queries whose noise leaves room within combined={combined}, got the multipliers "
            f"{', '.join(map(repr, others))}. Give them more noise: a tenth of the expected batch size, say."
        )
    value = combined * math.sqrt(1 / (combined * combined * left))
    while combined_noise_multiplier(value, *others) < combined:
        value = math.nextafter(value, math.inf)
    return value


def alike(a: StepEvent, b: StepEvent) -> bool:
    """Whether two events differ in their counts at most."""
    return (
        a.noise_multiplier == b.noise_multiplier
        and a.sampling_prob == b.sampling_prob
        and kind_of(a) == kind_of(b)
    )


def with_count(event: StepEvent, count: int) -> StepEvent:
    """`replace(event, count=count)`, but the other fields are not checked again."""
    new = object.__new__(StepEvent)
    for name in StepEvent.__slots__:
        object.__setattr__(new, name, getattr(event, name))
    object.__setattr__(new, "count", _checked_count(count))
    return new


def _checked_count(count: int) -> int:
    if count > MAX_COUNT:
        raise ValueError(
            f"Expected count <= 1e300, got a number of {len(hex(count)) - 2} hex digits."
        )
    return count
