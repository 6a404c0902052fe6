"""The one record that sampler, clipping, noise and accountant all read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpfunc import _checks
from dpfunc.events import CUSTOM, StepEvent, combined_noise_multiplier
from dpfunc.schedules import Schedule
from dpfunc.typing import ClippingRule, Query

MIN_SENSITIVITY, MAX_SENSITIVITY = 1e-30, 1e30
"""Clip norms outside this range would meet the ends of float32, where rounding is no longer relative."""

OR_A_RULE = "Or pass a clipping rule: an object with sensitivity, order and scales(norms)."
_LAPLACE = (
    "The L1 norm of a vector of L2 norm C is up to sqrt(d) C: Laplace noise scaled to C would have sqrt(d) "
    "times the epsilon it seems to have. Use L1Clipping(l1_clip_norm=...)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledClipping:
    """A clipping rule whose bounds are multiplied by another factor at each step.

    A `Schedule` in place of a clip norm means this around flat clipping.

    Args:
        factor: a positive number for each step; times the rule's sensitivity in [1e-30, 1e30].
        clipping: the L2 clip norm at factor 1, or the rule.

    Guarantees:
        At a step of factor f the rule sees norms divided by f, and noise and clipped gradients are
        multiplied by f after they met: the ratio of noise to sensitivity is the same at every step.

    Raises:
        ValueError, TypeError: factor is no Schedule, or a number is out of range.

    >>> from dpfunc.schedules import exponential
    >>> ScheduledClipping(factor=exponential(4.0, decay=0.5, num_steps=3))
    ScheduledClipping(factor=Schedule(4 to 1 in 3 steps), clipping=1.0)
    """

    factor: Schedule
    clipping: float | ClippingRule = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clipping", _checked_clipping(self.clipping))
        if not isinstance(self.factor, Schedule):
            raise TypeError(f"Expected factor to be a Schedule, got {self.factor!r}.")
        size = sensitivity_of(self.clipping)
        _at_every_step("factor", self.factor, lambda f: check_sensitivity(factor=f * size))


@dataclass(frozen=True, slots=True, kw_only=True)
class DPSGD:
    """Differentially private SGD: Poisson batches, clipped gradients, noise.

    Args:
        clipping: the largest L2 norm of one example's gradient, in gradient units, in
            [1e-30, 1e30], or a `Schedule` of them; or a clipping rule, which has a sensitivity; or
            `ScheduledClipping`, or `AdaptiveClipping`.
        noise_multiplier: scale of the noise over the sensitivity, finite, >= 0; or a `Schedule`.
        sampling_prob: probability that an example is in a batch, in [0, 1]; or a `Schedule`.
        expected_batch_size: the public number that the noisy sum is divided by, > 0. Yours to
            choose, usually near sampling_prob times the number of examples; it is not computed from
            the data, whose size is private when an example may be added or removed.
        mechanism: the noise. "gaussian"; "laplace", for a rule of order 1; or "custom:NAME", your own.
        sampling: "poisson", "truncated_poisson" (see `poisson_batches`), or "none" (full batch).
        relation: which data sets are neighbours: "add_or_remove_one", "replace_one", "zero_out". The
            noise is the same for all; the accountants know what each costs.
        overflow_prob: for "truncated_poisson", a public upper bound on the probability that a draw
            is cut (see `overflow_probability`); 0 says that none is given. 0 for any other sampling.
        loss_reduction: "mean" divides the noisy sum by expected_batch_size, "sum" by nothing.
        noise: for "custom:NAME" alone, `noise(key, shape, dtype=dtype)`: numbers of scale 1, a pure
            function of a key of this leaf and step. Accountants refuse its events until
            `account_as` says what they cost.
        telemetry: further numbers about each batch to release with noise of their own: `MeanLoss`,
            `ClipFraction`, `NormQuantile`, or your own `Query`.

    Guarantees:
        Fields are public by rule. No key and nothing computed from data is ever in this record.
        All queries on one draw, the gradient's and those of telemetry and adaptive clipping, are one
        event, whose noise multiplier is that of all of them together.

    Raises:
        ValueError, TypeError: a field is out of its range (at any step of a schedule), NaN, or not one
            of the names above; Laplace noise on gradients clipped in L2; telemetry under another
            noise than Gaussian, whose joint cost is not derived.

    Source: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> mechanism = DPSGD(
    ...     clipping=1.0, noise_multiplier=1.1, sampling_prob=0.01, expected_batch_size=256)
    >>> mechanism.event() == StepEvent(noise_multiplier=1.1, sampling_prob=0.01)
    True
    """

    clipping: Any
    noise_multiplier: float | Schedule
    sampling_prob: float | Schedule
    expected_batch_size: float
    mechanism: str = "gaussian"
    sampling: str = "poisson"
    relation: str = "add_or_remove_one"
    overflow_prob: float = 0.0
    loss_reduction: str = "mean"
    noise: Callable[..., Any] | None = None
    telemetry: tuple[Query, ...] = ()

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if isinstance(self.clipping, Schedule):
            put("clipping", ScheduledClipping(factor=self.clipping))
        elif not isinstance(self.clipping, ScheduledClipping) and self.adaptive is None:
            put("clipping", _checked_clipping(self.clipping))
        put("noise_multiplier", self._checked_noise())
        size = _checks.positive(expected_batch_size=self.expected_batch_size)
        if not MIN_SENSITIVITY <= size <= MAX_SENSITIVITY:
            raise ValueError(
                f"Expected {MIN_SENSITIVITY} <= expected_batch_size <= {MAX_SENSITIVITY}, got {size}."
            )
        put("expected_batch_size", size)
        _checks.choice(("mean", "sum"), loss_reduction=self.loss_reduction)
        _checks.choice(("poisson", "truncated_poisson", "none"), sampling=self.sampling)
        if isinstance(self.sampling_prob, Schedule):
            _at_every_step("sampling_prob", self.sampling_prob, self._event)
        else:
            put("sampling_prob", self._event(self.sampling_prob).sampling_prob)
        put("overflow_prob", self._event(0.0 if self.sampling != "none" else 1.0).overflow_prob)
        put("telemetry", _checked_telemetry(self.telemetry))
        names = [query.name for query in self.queries]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected queries of different names, got {names}.")
        self._check_mechanism()

    @property
    def rule(self) -> float | ClippingRule:
        """What clips, before any factor: an L2 clip norm or a rule."""
        return getattr(self.clipping, "clipping", self.clipping)

    @property
    def factor(self) -> Schedule | None:
        """What the rule's bounds are multiplied by at each step, where that is known before the run."""
        return self.clipping.factor if isinstance(self.clipping, ScheduledClipping) else None

    @property
    def adaptive(self) -> Any:
        """The clipping, where a query of its own moves it from step to step."""
        moves = isinstance(self.clipping, Query) and hasattr(self.clipping, "clipping")
        return self.clipping if moves else None

    @property
    def sensitivity(self) -> float:
        """The most that one example can change the clipped sum, in gradient units, at factor 1."""
        return sensitivity_of(self.rule)

    @property
    def queries(self) -> tuple[Query, ...]:
        """All that is asked of a batch beside its gradient."""
        return self.telemetry + (() if self.adaptive is None else (self.adaptive,))

    @property
    def divisor(self) -> float:
        """What the noisy sum is divided by: a public number."""
        return self.expected_batch_size if self.loss_reduction == "mean" else 1.0

    @property
    def is_scheduled(self) -> bool:
        """Whether a number of its event depends on the step."""
        return isinstance(self.noise_multiplier, Schedule) or isinstance(
            self.sampling_prob, Schedule
        )

    def check_covers(self, num_steps: int) -> None:
        """Refuse a run that a schedule is too short for, before it starts."""
        numbers = {
            "noise_multiplier": self.noise_multiplier,
            "sampling_prob": self.sampling_prob,
            "clipping": self.factor,
        }
        for name, schedule in numbers.items():
            if isinstance(schedule, Schedule) and len(schedule) < num_steps:
                raise ValueError(
                    f"Expected the schedule of {name} to cover num_steps={num_steps}, got one of "
                    f"{len(schedule)} steps."
                )

    def sampling_prob_at(self, step: int) -> float:
        """The sampling probability of a step."""
        return _at(self.sampling_prob, step)

    def event(self, step: int | None = None) -> StepEvent:
        """What a step with this mechanism releases, for the log.

        Args:
            step: which step; None only where no schedule depends on it.

        Raises:
            ValueError: a schedule that is shorter, or no step where there is one.
        """
        if step is None and self.is_scheduled:
            raise ValueError(
                "Expected event(step) of a mechanism with a schedule, got no step: which numbers ran "
                "depends on it. In a loop write mechanism.event(batch.step)."
            )
        step = step if step is None else _checks.integer(at_least=0, step=step)
        noises = [_at(self.noise_multiplier, step), *(q.noise_multiplier for q in self.queries)]
        return self._event(_at(self.sampling_prob, step), combined_noise_multiplier(*noises))

    def _event(self, sampling_prob: float, noise_multiplier: float = 0.0) -> StepEvent:
        return StepEvent(
            noise_multiplier=noise_multiplier,
            sampling_prob=sampling_prob,
            mechanism=self.mechanism,
            sampling=self.sampling,
            relation=self.relation,
            overflow_prob=self.overflow_prob,
        )

    def _checked_noise(self) -> float | Schedule:
        least = self.sensitivity * (1.0 if self.factor is None else min(self.factor))

        def check(value: float) -> float:
            number = _checks.finite_non_negative(
                "A multiplier that is a tensor goes to the step, as its fourth argument."
                if hasattr(value, "requires_grad")
                else "",
                noise_multiplier=value,
            )
            if 0.0 < number * least < MIN_SENSITIVITY:
                raise ValueError(
                    f"Expected noise_multiplier * sensitivity to be 0 or at least {MIN_SENSITIVITY}, got "
                    f"{number * least:g}: float32 would lose the noise. Rescale the loss."
                )
            return number

        if not isinstance(self.noise_multiplier, Schedule):
            return check(self.noise_multiplier)
        _at_every_step("noise_multiplier", self.noise_multiplier, check)
        return self.noise_multiplier

    def _check_mechanism(self) -> None:
        if self.mechanism == "laplace" and order_of(self.rule) != 1:
            raise ValueError(
                f"Expected a clipping rule of order 1 with mechanism='laplace', got {self.rule!r}. {_LAPLACE}"
            )
        custom = self.mechanism.startswith(CUSTOM)
        if custom != callable(self.noise) or (self.noise is not None and not custom):
            raise ValueError(
                "Expected noise= a function together with a mechanism named 'custom:NAME', got "
                f"{self.noise!r} with {self.mechanism!r}."
            )
        if self.queries and self.mechanism != "gaussian":
            raise ValueError(
                "Expected Gaussian noise beside telemetry or adaptive clipping, got "
                f"{self.mechanism!r}. What such queries on one draw cost together is not derived."
            )


def sensitivity_of(clipping: float | ClippingRule) -> float:
    return clipping.sensitivity if isinstance(clipping, ClippingRule) else clipping


def order_of(clipping: float | ClippingRule) -> int:
    return clipping.order if isinstance(clipping, ClippingRule) else 2


def noise_scales(clipping: float | ClippingRule, paths: Sequence[str]) -> Sequence[float]:
    """What the noise of each leaf is scaled to: the sensitivity, where the rule does not say otherwise."""
    own = getattr(clipping, "noise_scales", None)
    if own is None:
        return [sensitivity_of(clipping)] * len(paths)
    scales = list(own(paths))
    if len(scales) != len(paths) or not all(
        isinstance(s, (int, float)) and MIN_SENSITIVITY <= s <= MAX_SENSITIVITY for s in scales
    ):
        raise ValueError(
            f"Expected noise_scales to be {len(paths)} numbers in [{MIN_SENSITIVITY}, {MAX_SENSITIVITY}], "
            f"got {scales}."
        )
    return scales


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
    check_order(rule.order)
    return rule


def check_order(order: int) -> None:
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"Expected order of a clipping rule to be 1 or 2, got {order!r}.")


def check_mechanism(mechanism: DPSGD) -> None:
    """A DPSGD, and not what stands beside it in most signatures."""
    if not isinstance(mechanism, DPSGD):
        raise TypeError(
            f"Expected mechanism to be a dpfunc.DPSGD, got {type(mechanism).__name__}. "
            "Are the arguments in order?"
        )


def _checked_clipping(clipping: Any) -> float | ClippingRule:
    if isinstance(clipping, ClippingRule):
        return check_rule(clipping)
    return check_sensitivity(OR_A_RULE, l2_clip_norm=clipping)


def _checked_telemetry(telemetry: Any) -> tuple[Query, ...]:
    given = telemetry if isinstance(telemetry, (tuple, list)) else (telemetry,)
    if given is not telemetry or not all(
        isinstance(query, Query) and not hasattr(query, "clipping") for query in given
    ):
        raise TypeError(
            "Expected telemetry to be a tuple of queries, such as (MeanLoss(...),), got "
            f"{telemetry!r}. AdaptiveClipping goes into clipping."
        )
    for query in given:
        _checks.finite_non_negative(noise_multiplier=query.noise_multiplier)
        if not isinstance(query.name, str):
            raise TypeError(f"Expected the name of a query to be text, got {query.name!r}.")
    return tuple(given)


def _at(value: float | Schedule, step: int | None) -> float:
    return value(step or 0) if isinstance(value, Schedule) else value


def _at_every_step(name: str, schedule: Schedule, check: Callable[[float], Any]) -> None:
    """The first bad number of a schedule, with its step."""
    for step, value in enumerate(schedule):
        try:
            check(value)
        except ValueError as error:
            raise ValueError(f"{name} at step {step}: {error}") from None
