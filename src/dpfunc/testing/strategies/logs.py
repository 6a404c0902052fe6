"""Logs of what ran, of which an accountant knows every event."""

from __future__ import annotations

from hypothesis import strategies as st

from dpfunc.events import Log, StepEvent


def deltas(low: float = -12, high: float = -1) -> st.SearchStrategy[float]:
    """Probabilities of failure, evenly over the exponents."""
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


@st.composite
def events(
    draw: st.DrawFn,
    *,
    mechanisms: tuple[str, ...] = ("gaussian",),
    relations: tuple[str, ...] = ("add_or_remove_one",),
    min_noise: float = 0.3,
    min_prob: float = 1e-5,
    max_noise: float = 50.0,
    max_count: int = 10_000,
) -> StepEvent:
    """Events, most of them Poisson-sampled, a few of full batches.

    The defaults are what every accountant takes; Laplace noise, "replace_one" and "zero_out" are for "pld".
    """
    sampling = draw(st.sampled_from(["poisson", "poisson", "poisson", "none"]))
    prob = 1.0 if sampling == "none" else draw(st.floats(min_prob, 1.0))
    return StepEvent(
        noise_multiplier=draw(st.floats(min_noise, max_noise)),
        sampling_prob=prob,
        count=draw(st.integers(1, max_count)),
        mechanism=draw(st.sampled_from(mechanisms)),
        sampling=sampling,
        relation=draw(st.sampled_from(relations)),
    )


def logs(
    of: st.SearchStrategy[StepEvent] | None = None, *, max_size: int = 3
) -> st.SearchStrategy[Log]:
    """Logs of up to max_size runs, the empty one too; `of` draws the events, of one relation."""
    return st.lists(events() if of is None else of, max_size=max_size).map(Log)
