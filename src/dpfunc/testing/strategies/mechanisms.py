"""Mechanisms: all that a `DPSGD` record may say, in numbers that a few examples can be stepped with."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from dpfunc.events import RELATIONS
from dpfunc.gradients import FlatClipping, L1Clipping
from dpfunc.mechanism import DPSGD, ScheduledClipping
from dpfunc.schedules import Schedule
from dpfunc.telemetry import AdaptiveClipping, ClipFraction, MeanLoss, NormQuantile
from dpfunc.testing.strategies.gradients import clip_norms
from dpfunc.typing import ClippingRule, Query

_NUM_STEPS = 8


def schedules(
    values: st.SearchStrategy[float], num_steps: int = _NUM_STEPS
) -> st.SearchStrategy[Schedule]:
    """Schedules of so many steps, of numbers from `values`."""
    return st.lists(values, min_size=num_steps, max_size=num_steps).map(Schedule)


def queries() -> st.SearchStrategy[tuple[Query, ...]]:
    """Telemetry: none, or up to three queries of different names."""
    noise = st.floats(1.0, 100.0)
    each: list[Any] = [
        st.builds(MeanLoss, noise_multiplier=noise, high=st.floats(1.0, 10.0)),
        st.builds(ClipFraction, noise_multiplier=noise),
        st.builds(
            NormQuantile,
            quantile=st.floats(0.1, 0.9),
            initial=st.floats(0.1, 10),
            noise_multiplier=noise,
        ),
    ]
    chosen = st.lists(st.sampled_from(range(3)), unique=True, max_size=3)
    return chosen.flatmap(lambda which: st.tuples(*(each[i] for i in which)))


@st.composite
def mechanisms(
    draw: st.DrawFn,
    rules: st.SearchStrategy[ClippingRule] | None = None,
    *,
    with_queries: bool = False,
    with_schedules: bool = True,
    num_steps: int = _NUM_STEPS,
) -> DPSGD:
    """`DPSGD` records: Gaussian or Laplace, Poisson or full batch, any relation, mean or sum.

    With schedules, the noise multiplier, the sampling probability or the clip norm may change over
    num_steps steps. With queries, Gaussian ones may have telemetry and adaptive clipping.
    Laplace noise comes with rules of order 1, drawn here; other rules come from `rules`, flat by default.
    """
    laplace = draw(st.booleans())
    bounds = clip_norms(-2, 2)
    if laplace:
        rule: Any = draw(st.builds(L1Clipping, l1_clip_norm=bounds))
    else:
        rule = draw(st.builds(FlatClipping, l2_clip_norm=bounds) if rules is None else rules)
        if with_queries and draw(st.booleans()):
            rule = AdaptiveClipping(
                quantile=draw(st.floats(0.1, 0.9)),
                initial=draw(st.floats(0.1, 10.0)),
                noise_multiplier=draw(st.floats(1.0, 100.0)),
            )
    if with_schedules and not isinstance(rule, AdaptiveClipping) and draw(st.booleans()):
        factors = schedules(st.floats(0.25, 4.0), num_steps)
        rule = ScheduledClipping(factor=draw(factors), clipping=rule)

    def number(values: st.SearchStrategy[float]) -> Any:
        moves = with_schedules and draw(st.booleans())
        return draw(schedules(values, num_steps) if moves else values)

    full = draw(st.booleans())
    return DPSGD(
        clipping=rule,
        noise_multiplier=number(st.floats(0.3, 10.0)),
        sampling_prob=1.0 if full else number(st.floats(0.01, 1.0)),
        expected_batch_size=draw(st.floats(0.5, 100.0)),
        mechanism="laplace" if laplace else "gaussian",
        sampling="none" if full else "poisson",
        relation=draw(st.sampled_from(RELATIONS)),
        loss_reduction=draw(st.sampled_from(["mean", "sum"])),
        telemetry=draw(queries()) if with_queries and not laplace else (),
    )
