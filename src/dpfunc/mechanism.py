"""The one record that sampler, clipping, noise and accountant all read."""

from __future__ import annotations

from dataclasses import dataclass

from dpfunc import _checks
from dpfunc.events import StepEvent
from dpfunc.typing import ClippingRule

MIN_SENSITIVITY, MAX_SENSITIVITY = 1e-30, 1e30
"""Clip norms outside this range would meet the ends of float32, where rounding is no longer relative."""

OR_A_RULE = "Or pass a clipping rule: an object with sensitivity, order and scales(norms)."


@dataclass(frozen=True, slots=True, kw_only=True)
class DPSGD:
    """Differentially private SGD: Poisson batches, clipped gradients, Gaussian noise.

    Args:
        clipping: the largest L2 norm of one example's gradient, in gradient units, in
            [1e-30, 1e30]; or a clipping rule, which has a sensitivity.
        noise_multiplier: standard deviation of the noise over the sensitivity, finite, >= 0.
        sampling_prob: probability that an example is in a batch, in [0, 1].
        expected_batch_size: the public number that the noisy sum is divided by, > 0. Yours to
            choose, usually near sampling_prob times the number of examples; it is not computed from
            the data, whose size is private when an example may be added or removed.
        mechanism: "gaussian".
        sampling: "poisson", "truncated_poisson" (see `poisson_batches`), or "none" (full batch).
        relation: which data sets are neighbours; the accountants say which they know.
        overflow_prob: for "truncated_poisson", a public upper bound on the probability that a draw
            is cut (see `overflow_probability`); 0 says that none is given. 0 for any other sampling.

    Guarantees:
        Fields are public by rule. No key and nothing computed from data is ever in this record.

    Raises:
        ValueError, TypeError: a field is out of its range, NaN, or not one of the names above.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> mechanism = DPSGD(
    ...     clipping=1.0, noise_multiplier=1.1, sampling_prob=0.01, expected_batch_size=256)
    >>> mechanism.event() == StepEvent(noise_multiplier=1.1, sampling_prob=0.01)
    True
    """

    clipping: float | ClippingRule
    noise_multiplier: float
    sampling_prob: float
    expected_batch_size: float
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    relation: str = "add_or_remove_one"
    overflow_prob: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.clipping, ClippingRule):
            check_rule(self.clipping)
        else:
            object.__setattr__(
                self, "clipping", check_sensitivity(OR_A_RULE, l2_clip_norm=self.clipping)
            )
        number = _checks.finite_non_negative(
            "A multiplier that is a tensor goes to the step, as its fourth argument."
            if hasattr(self.noise_multiplier, "requires_grad")
            else "",
            noise_multiplier=self.noise_multiplier,
        )
        object.__setattr__(self, "noise_multiplier", number)
        if 0.0 < number * self.sensitivity < MIN_SENSITIVITY:
            raise ValueError(
                f"Expected noise_multiplier * sensitivity to be 0 or at least {MIN_SENSITIVITY}, got "
                f"{number * self.sensitivity:g}: float32 would lose the noise. Rescale the loss."
            )
        size = _checks.positive(expected_batch_size=self.expected_batch_size)
        object.__setattr__(self, "expected_batch_size", size)
        _checks.choice(("gaussian",), mechanism=self.mechanism)
        _checks.choice(("poisson", "truncated_poisson", "none"), sampling=self.sampling)
        event = StepEvent(
            noise_multiplier=0.0,
            sampling_prob=self.sampling_prob,
            mechanism=self.mechanism,
            sampling=self.sampling,
            relation=self.relation,
            overflow_prob=self.overflow_prob,
        )
        object.__setattr__(self, "sampling_prob", event.sampling_prob)
        object.__setattr__(self, "overflow_prob", event.overflow_prob)

    @property
    def sensitivity(self) -> float:
        """The most that one example can change the clipped sum, in gradient units."""
        return (
            self.clipping.sensitivity if isinstance(self.clipping, ClippingRule) else self.clipping
        )

    def event(self, step: int = 0) -> StepEvent:
        """What a step with this mechanism releases, for the log."""
        del step  # every step is alike; a mechanism with schedules would read it
        return StepEvent(
            noise_multiplier=self.noise_multiplier,
            sampling_prob=self.sampling_prob,
            mechanism=self.mechanism,
            sampling=self.sampling,
            relation=self.relation,
            overflow_prob=self.overflow_prob,
        )


def check_sensitivity(advice: str = "", /, **named: float) -> float:
    """A clip norm that float32 arithmetic can keep to."""
    ((name, value),) = named.items()
    number = _checks.positive(advice, **named)
    if not MIN_SENSITIVITY <= number <= MAX_SENSITIVITY:
        raise ValueError(
            f"Expected {MIN_SENSITIVITY} <= {name} <= {MAX_SENSITIVITY}, got {value!r}. Rescale the loss."
        )
    return number


def check_rule(rule: ClippingRule) -> ClippingRule:
    """A rule whose sensitivity is a usable number, in a norm that noise can be scaled to."""
    check_sensitivity(sensitivity=rule.sensitivity)
    if isinstance(rule.order, bool) or rule.order not in (1, 2):
        raise ValueError(f"Expected order of a clipping rule to be 1 or 2, got {rule.order!r}.")
    return rule


def check_mechanism(mechanism: DPSGD) -> None:
    """A DPSGD, and not what stands beside it in most signatures."""
    if not isinstance(mechanism, DPSGD):
        raise TypeError(
            f"Expected mechanism to be a dpfunc.DPSGD, got {type(mechanism).__name__}. "
            "Are the arguments in order?"
        )
