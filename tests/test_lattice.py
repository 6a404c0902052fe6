"""The lattice against closed forms at 60 digits, references to 15 digits, and its own laws."""

import functools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpfunc.accounting.laplace import LaplacePair, SplicedPair
from dpfunc.accounting.lattice import bounds, lattice_delta, lattice_epsilon
from dpfunc.accounting.lattice.composition import compose
from dpfunc.accounting.lattice.laws import merge, split
from dpfunc.accounting.lattice.outline import Log, Outline
from dpfunc.accounting.pairs import GaussianPair

mpmath = pytest.importorskip("mpmath")
VECTORS = json.loads((Path(__file__).parent / "golden/epsilon_vectors.json").read_text())
RARE = [  # few steps, or few hits: (noise, probability, steps, delta, epsilon)
    (1.0, 0.001, 100, 1e-8, 0.193544),
    (0.3, 0.01, 100, 1e-5, 26.8347),
    (0.3, 0.001, 1000, 1e-6, 21.678),
    (0.3, 1e-4, 10000, 1e-6, 14.5386),
    (1.0, 1e-4, 10000, 1e-8, 0.0623033),
]
PAIRS = [
    GaussianPair(1.0, (0.0, 1.0), (1.0,)),
    GaussianPair(0.8, (0.99, 0.01), (1.0,)),
    GaussianPair(0.8, (1.0,), (0.99, 0.01)),
    GaussianPair(0.4, (0.999, 0.001), (1.0,)),
    GaussianPair(2.0, (0.9, 0.1), (0.9, 0.1)),
    GaussianPair(1.0, (0.81, 0.18, 0.01), (1.0,)),
    LaplacePair(1.0, (0.0, 1.0), (1.0,)),
    LaplacePair(0.5, (0.9, 0.1), (1.0,)),
    LaplacePair(2.0, (1.0,), (0.99, 0.01)),
    SplicedPair(1.5, 0.05),
]


def pair_of(mechanism, noise, prob, direction):
    kind = GaussianPair if mechanism == "gaussian" else LaplacePair
    mixed = (1 - prob, prob) if prob < 1 else (0.0, 1.0)
    return kind(noise, mixed, (1.0,)) if direction == "remove" else kind(noise, (1.0,), mixed)


def exact_delta(mechanism, noise, prob, direction, epsilon):
    """One step, in closed form at 60 digits: the outcome x where the loss is epsilon, then tails."""
    mp = mpmath
    with mp.workdps(60):
        s, q, e = mp.mpf(noise), mp.mpf(prob), mp.mpf(epsilon)
        stay = 1 - q
        ratio = (mp.exp(e if direction == "remove" else -e) - stay) / q
        if mechanism == "gaussian":
            x = s * s * mp.log(ratio) + mp.mpf(1) / 2 if ratio > 0 else -mp.inf
            above = lambda centre: mp.ncdf((centre - x) / s)  # noqa: E731
            below = lambda centre: mp.ncdf((x - centre) / s)  # noqa: E731
        else:
            x = (s * mp.log(ratio) + 1) / 2 if ratio > 0 else -mp.inf
            x = -mp.inf if x < 0 else mp.inf if x >= 1 else x

            def below(centre):
                if mp.isinf(x):
                    return mp.mpf(x > 0)
                return (
                    mp.exp((x - centre) / s) / 2 if x < centre else 1 - mp.exp((centre - x) / s) / 2
                )

            above = lambda centre: 1 - below(centre)  # noqa: E731
        if direction == "remove":
            return stay * above(0) + q * above(1) - mp.exp(e) * above(0)
        return below(0) - mp.exp(e) * (stay * below(0) + q * below(1))


@settings(max_examples=40, deadline=None)
@given(
    mechanism=st.sampled_from(["gaussian", "laplace"]),
    noise=st.floats(0.3, 5.0),
    prob=st.sampled_from([1e-4, 0.01, 0.3, 1.0]),
    direction=st.sampled_from(["remove", "add"]),
    place=st.floats(0.02, 0.95),
)
@example("gaussian", 1.0, 0.001, "remove", 0.5)
@example("gaussian", 1.25, 0.01, "remove", 0.25)
def test_one_step_is_the_closed_form(mechanism, noise, prob, direction, place):
    pair = pair_of(mechanism, noise, prob, direction)
    if prob == 1.0 and direction == "add":
        return
    low, high = pair.support
    low, high = max(low, -3.0), min(high, 3.0 / noise)
    epsilon = low + place * (high - low)
    truth = exact_delta(mechanism, noise, prob, direction, epsilon)
    (lower,), (upper,) = lattice_delta([(pair, 1)], np.array([epsilon]))
    # The weights are floats too: their sum is 1 to one unit in the last place.
    assert lower <= truth * (1 + 1e-12) + 1e-16
    assert truth <= upper * (1 + 1e-12) + 1e-16
    if lower > 1e-12:
        delta = float((lower + upper) / 2)  # which may lie beside the truth by half their distance
        below, above = lattice_epsilon([(pair, 1)], delta)
        asked = (mechanism, noise, prob, direction)
        assert above > below - 1e-12
        assert below <= 0.0 or exact_delta(*asked, below) >= delta * (1 - 1e-12) - 1e-16
        assert exact_delta(*asked, above) <= delta * (1 + 1e-12) + 1e-16


@pytest.mark.parametrize("delta", [1e-20, 1e-50, 1e-100])
def test_small_deltas_of_one_gaussian(delta):
    lower, upper = lattice_epsilon([(PAIRS[0], 1)], delta)
    assert exact_delta("gaussian", 1.0, 1.0, "remove", lower) >= delta
    assert exact_delta("gaussian", 1.0, 1.0, "remove", upper) <= delta
    assert upper - lower <= 1e-6 * upper


@pytest.mark.parametrize("case", RARE, ids=str)
def test_rare_hits(case):
    noise, prob, steps, delta, reference = case
    lower, upper = lattice_epsilon([(pair_of("gaussian", noise, prob, "remove"), steps)], delta)
    digits = 10.0 ** (math.floor(math.log10(reference)) - 5)  # the reference has six
    assert lower <= reference + digits
    assert upper >= reference - digits
    assert upper - lower <= 2e-5 * max(1.0, upper)


@pytest.mark.parametrize(
    "vector",
    [
        v
        for v in VECTORS["vectors"]
        if v["delta"] > 1e-200
        and len(v["log"]) <= 3
        and sum(part["steps"] for part in v["log"]) <= 10000
    ],
    ids=lambda v: v["id"],
)
@pytest.mark.parametrize("direction", ["remove", "add"])
def test_the_references_lie_between_the_bounds(vector, direction):
    pairs = [
        (pair_of(e["mechanism"], e["noise_multiplier"], e["rate"], direction), e["steps"])
        for e in vector["log"]
    ]
    lower, upper = lattice_epsilon(pairs, vector["delta"], width=1e-5)
    reference = vector[f"eps_{direction}"]
    slack = max(1e-8 * max(1.0, reference), reference - vector["eps_lower"])
    assert lower <= reference + slack
    assert reference - slack <= upper
    assert upper - lower <= 1e-3 * max(1.0, upper)


@pytest.mark.parametrize("vector", VECTORS["fixed_size_without_replacement"], ids=lambda v: v["id"])
def test_fixed_size_sampling(vector):
    (part,) = vector["log"]
    noise, prob = part["noise_multiplier"], part["rate"]
    lower, upper = lattice_epsilon(
        [(SplicedPair(noise, prob), part["steps"])], vector["delta"], width=1e-5
    )
    assert vector["eps_lower"] < lower
    assert upper <= vector["eps_upper"]  # theirs is the same law, on a coarser lattice, rounded up
    assert upper == pytest.approx(vector["eps_upper"], abs=5e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_masses_add_up_and_have_their_losses(pair):
    ends = np.concatenate([[-np.inf], np.linspace(-3, 3, 241), [np.inf]])
    p, q = pair.masses(ends)
    assert p.sum() == pytest.approx(1.0, abs=1e-14)
    assert q.sum() == pytest.approx(1.0, abs=1e-14)
    some = p > 1e-13
    with np.errstate(divide="ignore"):
        ratio = np.log(p[some] / q[some])
    assert (ratio >= ends[:-1][some] - 1e-9).all()
    assert (ratio <= ends[1:][some] + 1e-9).all()
    coarse = pair.masses(ends[::2])
    assert coarse[0] == pytest.approx(p[::2] + p[1::2], abs=1e-15)
    assert coarse[1] == pytest.approx(q[::2] + q[1::2], abs=1e-15)


@pytest.mark.parametrize("pair", [p for p in PAIRS if hasattr(p, "atoms")], ids=str)
def test_an_atom_at_the_end_of_an_interval_is_in_the_one_below(pair):
    for loss, p_atom, q_atom in pair.atoms:
        before, after = np.nextafter(loss, -np.inf), np.nextafter(loss, np.inf)
        p, q = pair.masses(np.array([before, loss, after]))
        assert p == pytest.approx([p_atom, 0.0], abs=1e-14)
        assert q == pytest.approx([q_atom, 0.0], abs=1e-14)
        assert math.log(p_atom / q_atom) == pytest.approx(loss, abs=1e-12)


def test_the_spliced_profile_is_the_two_of_the_theorem():
    pair, noise, prob = SplicedPair(1.5, 0.05), 1.5, 0.05
    for epsilon in (-1.0, -0.3, -0.01, 0.0, 0.01, 0.3, 1.0, 2.0):
        p, q = pair.masses(np.array([-np.inf, epsilon, np.inf]))
        direction = "remove" if epsilon >= 0 else "add"
        truth = exact_delta("gaussian", noise / 2, prob, direction, epsilon)
        assert p[1] - math.exp(epsilon) * q[1] == pytest.approx(float(truth), rel=1e-12)


def profile(law, step, epsilons):
    losses = law.base + step * np.arange(len(law.mass))
    return np.array([
        law.infinite + law.mass @ np.maximum(0.0, -np.expm1(e - losses)) for e in epsilons
    ])  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("step", [0.3, 0.05, 0.01, 1e-3, 1e-5])
def test_a_discretised_step_bounds_the_profile_everywhere(pair, step):
    anchor = Outline.of(pair).anchor
    low, high = pair.support
    span = max(low, anchor - 2000 * step, -6.0), min(high, anchor + 2000 * step, 6.0)
    lower = merge(pair, anchor, span, step, 1e-30)
    upper = split(pair, anchor, span, step, 1e-30)
    points = upper.base + step * np.arange(len(upper.mass))
    some = points[:: max(1, len(points) // 40)]
    epsilons = np.concatenate(
        [some, some + 0.37 * step, some + 0.5 * step, [anchor, anchor - step / 3]]
    )
    ends = np.concatenate([[-np.inf], np.sort(epsilons), [np.inf]])
    p, q = (np.cumsum(mass[::-1])[::-1][1:] for mass in pair.masses(ends))
    truth = p - np.exp(ends[1:-1]) * q
    low_values, high_values = profile(lower, step, ends[1:-1]), profile(upper, step, ends[1:-1])
    assert (low_values <= truth + 1e-13).all()
    assert (truth <= high_values + 1e-13).all()
    inner = (ends[1:-1] > span[0]) & (ends[1:-1] < span[1])
    dropped = pair.masses(np.array([-np.inf, span[0], span[1], np.inf]))[0][[0, 2]].sum()
    assert (high_values - low_values)[inner].max(initial=0.0) <= 1.01 * step + 2 * dropped + 1e-12


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_mean_of_v_is_kept(pair):
    # By the upper law to rounding; by the lower law to more than second order in the step.
    step = bounds._aligned(Log([(pair, 1)]), 1e-3)
    anchor, (low, high) = Outline.of(pair).anchor, pair.support
    span = max(low, -2.0), min(high, 12.0)
    lower = merge(pair, anchor, span, step, 1e-30)
    upper = split(pair, anchor, span, step, 1e-30)
    p, q = pair.masses(np.array([-np.inf, upper.base, np.inf]))
    means = [
        law.mass @ np.exp(-law.base - step * np.arange(len(law.mass))) for law in (lower, upper)
    ]
    assert means[1] - p[0] * math.exp(-upper.base) == pytest.approx(q[1], abs=1e-11)
    if not math.isinf(low):
        assert means[0] == pytest.approx(1.0, abs=3e-5)


@settings(max_examples=15, deadline=None)
@given(
    which=st.integers(0, len(PAIRS) - 1),
    other=st.integers(0, len(PAIRS) - 1),
    count=st.integers(1, 30),
    delta=st.floats(-30, -1).map(lambda x: 10.0**x),
)
def test_bounds_are_ordered_and_grow_with_steps(which, other, count, delta):
    one = lattice_epsilon([(PAIRS[which], count)], delta, width=1e-4)
    two = lattice_epsilon([(PAIRS[which], count + 1)], delta, width=1e-4)
    more = lattice_epsilon([(PAIRS[which], count), (PAIRS[other], 2)], delta, width=1e-4)
    assert 0.0 <= one[0] <= one[1] < math.inf
    assert one[0] <= two[1]
    assert one[0] <= more[1]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_narrow_bounds_lie_within_wide_ones(pair):
    wide = lattice_epsilon([(pair, 7)], 1e-6, width=1e-2)
    narrow = lattice_epsilon([(pair, 7)], 1e-6, width=1e-7)
    assert wide[0] <= narrow[1]
    assert narrow[0] <= wide[1]
    assert narrow[1] - narrow[0] <= 1e-7 * max(1.0, narrow[1])


def test_counts_split_as_they_like():
    pair = PAIRS[1]
    whole = lattice_epsilon([(pair, 10)], 1e-6)
    parts = lattice_epsilon([(pair, 3), (pair, 7)], 1e-6)
    assert whole[0] <= parts[1]
    assert parts[0] <= whole[1]
    with pytest.raises(ValueError, match="whole counts"):
        lattice_epsilon([(pair, 2.5)], 1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_delta_and_epsilon_are_inverse(pair):
    log = [(pair, 4)]
    for delta in (0.1, 1e-4, 1e-12):
        lower, upper = lattice_epsilon(log, delta)
        deltas = lattice_delta(log, np.array([lower, upper]))
        assert deltas[0][1] <= delta * (1 + 1e-9)
        if lower > 0:
            assert deltas[1][0] >= delta * (1 - 1e-9)


def test_delta_at_any_real_epsilon():
    log = [(GaussianPair(1.0, (0.99, 0.01), (1.0,)), 10)]
    epsilons = np.array([-1e3, -1.0, -0.2, -0.05, 0.0, 0.1, 1.0, 5.0, 40.0])
    lower, upper = lattice_delta(log, epsilons)
    assert (lower <= upper).all()
    assert (np.diff(upper) <= 1e-15).all()
    assert lower[:3] == pytest.approx(-np.expm1(epsilons[:3]), abs=1e-15)  # below the infimum
    assert (upper[:3] - lower[:3] <= 1e-15).all()
    assert (np.log(upper / lower)[3:] <= 1e-3).all()
    laplace = [(LaplacePair(10.0, (0.0, 1.0), (1.0,)), 20)]
    lower, upper = lattice_delta(laplace, np.array([1.0, 2.0 - 1e-9, 2.0 + 1e-9, 3.0]))
    assert upper[0] - lower[0] < 1e-6
    assert (upper[2:] == 0.0).all()
    assert upper[1] < 1e-9


@functools.cache
def delta_of(pair, count, epsilons):
    return lattice_delta([(pair, count)], np.array(epsilons))


@pytest.mark.parametrize("cut", [0.1, 0.6, 2.0])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("weights", [((0.9, 0.1), (1.0,)), ((1.0,), (0.9, 0.1)), ((0.9, 0.1),) * 2])
def test_a_bad_tilt_or_window_costs_width_not_truth(weights, scale, cut):
    pair, count, step = GaussianPair(1.0, *weights), 50, 4e-3
    log, epsilons = Log([(pair, count)]), np.linspace(-1.0, 6.0, 15)
    tilt = log.tilt(2.0, None, 1e-6)
    low, high = tilt.window
    tilt = tilt._replace(theta=scale * tilt.theta, further=tuple(scale * t for t in tilt.further))
    truth = delta_of(pair, count, tuple(epsilons))
    lower, upper = (
        [make(pair, log.outlines[0].anchor, tilt.spans[0], step, 1e-30)] for make in (merge, split)
    )
    for window in ((low, high), (2.0 - cut, high), (low, 2.0 + cut), (2.0 - cut, 2.0 + cut)):
        narrow = tilt._replace(window=window)
        least = compose(log.counts, lower, step, narrow, -1).delta(epsilons)
        most = compose(log.counts, upper, step, narrow, 1).delta(epsilons)
        assert (least <= truth[1]).all()
        assert (np.minimum(most, 1.0) >= truth[0] - 1e-15).all()


HARD = [  # logs on which something once overflowed, vanished or had no grid; each with an epsilon
    ([(PAIRS[0], 1)], 40.0),
    ([(GaussianPair(0.02, (0.0, 1.0), (1.0,)), 1)], 1300.0),
    ([(GaussianPair(1e-4, (0.9, 0.1), (1.0,)), 3)], 1.0),
    ([(GaussianPair(1e3, (1 - 1e-9, 1e-9), (1.0,)), 100)], 0.0),
    ([(GaussianPair(1e3, (1.0,), (1 - 1e-9, 1e-9)), 1)], 0.1),
    ([(LaplacePair(1e-3, (0.999, 0.001), (1.0,)), 2)], 1900.0),
    ([(LaplacePair(1e3, (1 - 1e-9, 1e-9), (1.0,)), 1), (PAIRS[2], 5)], 0.0),
    ([(SplicedPair(1.1, 0.02), 1), (LaplacePair(438.0, (1.0,), (1 - 1e-9, 1e-9)), 20)], 1.0),
    ([(PAIRS[9], 0)], 0.0),
    ([], 0.0),
]


@pytest.mark.parametrize(("log", "epsilon"), HARD, ids=str)
def test_hard_logs_have_bounds_and_no_warnings(log, epsilon):
    epsilons = np.array([-1.0, epsilon])
    fine, wide = (lattice_delta(log, epsilons, width=width) for width in (1e-4, 1e-2))
    for lower, upper in (fine, wide):
        assert (lower >= 0).all()
        assert (lower <= upper).all()
        assert (upper <= 1).all()
        assert not np.signbit(lower).any()
    assert (fine[0] <= wide[1]).all()
    assert (wide[0] <= fine[1]).all()
    narrow, coarse = (lattice_epsilon(log, 1e-6, width=width) for width in (1e-4, 1e-2))
    assert 0.0 <= narrow[0] <= narrow[1]
    assert narrow[0] <= coarse[1]
    assert coarse[0] <= narrow[1]


@pytest.mark.parametrize("count", [1e9, 1e12, 1e27, 1e300])
@pytest.mark.parametrize("pair", PAIRS[1::4], ids=str)
def test_vast_counts_have_bounds_at_once(pair, count):
    start = time.process_time()
    lower, upper = lattice_epsilon([(pair, count)], 1e-6)
    assert 0.0 <= lower <= upper <= max(0.0, pair.support[1]) * count * (1 + 1e-12)
    (low,), (high,) = lattice_delta([(pair, count)], np.array([1.0]))
    assert 0.0 <= low <= high <= 1.0
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("count", [2.5, -1, math.inf, math.nan])
def test_counts_are_whole(count):
    with pytest.raises(ValueError, match="whole counts"):
        lattice_epsilon([(PAIRS[0], count)], 1e-6)


def test_at_the_ends_of_the_support_delta_is_exact():
    for noise in (0.5, 2.0):
        log = [(LaplacePair(noise, (0.0, 1.0), (1.0,)), 1)]
        ends = np.array([-2 / noise, -1 / noise, 1 / noise, 2 / noise])
        lower, upper = lattice_delta(log, ends)
        assert upper[:2] == pytest.approx(-np.expm1(ends[:2]), rel=1e-12)
        assert lower[:2] == pytest.approx(-np.expm1(ends[:2]), rel=1e-12)
        assert upper[2] <= 1e-13
        assert upper[3] == lower[3] == lower[2] == 0.0
        assert lattice_epsilon(log, 1e-12)[1] <= 1 / noise * (1 + 1e-13)
