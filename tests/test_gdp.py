"""Gaussian differential privacy: the profile to 12 digits, composition, and what the limit hides."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpfunc import StepEvent
from dpfunc.accounting.gdp import (
    GDP,
    gaussian_delta,
    gaussian_epsilon,
    gdp_delta,
    gdp_epsilon,
    log_gaussian_delta,
    mu_of,
)
from dpfunc.events import Log

VECTORS = json.loads(
    Path(__file__).with_name("golden").joinpath("epsilon_vectors.json").read_text()
)
MU = VECTORS["calibration"]["mu_gdp"]
GRID = [
    (mu, delta)
    for mu in (1e-8, 3e-5, 0.01, 0.3, 1.0, 4.0, 30.0, 998.425)
    for delta in (1e-300, 1e-200, 1e-100, 1e-30, 1e-12, 1e-5, 0.01, 0.3, 0.9)
]


def full(noise_multiplier=1.0, count=1, **fields):
    fields = {"sampling": "none", "sampling_prob": 1.0, **fields}
    return StepEvent(noise_multiplier=noise_multiplier, count=count, **fields)


def sampled(noise_multiplier=1.0, sampling_prob=0.01, count=1, **fields):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **fields
    )


def exact_delta(mu, epsilon):
    """The textbook difference, with digits enough for it to cancel as it likes."""
    mu, epsilon = mpmath.mpf(float(mu)), mpmath.mpf(float(epsilon))
    near = mpmath.ncdf(mu / 2 - epsilon / mu)
    return near - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


noises = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
mus = st.floats(-8, 3).map(lambda exponent: 10.0**exponent)
deltas = st.floats(-300, -0.05).map(lambda exponent: 10.0**exponent)


@pytest.mark.parametrize(("mu", "delta"), GRID)
def test_the_profile_has_twelve_digits(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60 - int(math.log10(delta))):
        for at in (epsilon, -epsilon / 3, epsilon * 0.7, 0.0, mu / 7, -mu, -1e-3, -50.0):
            true = exact_delta(mu, at)
            assert abs(gaussian_delta(mu, at) / true - 1) < 1e-12
            log = mpmath.log(true)
            assert abs(log_gaussian_delta(mu, at) - log) < 1e-12 * max(1, abs(log))


@given(mus, st.floats(-20, 40), st.floats(-3, 0))
def test_the_profile_has_twelve_digits_anywhere(mu, scaled, power):
    at = mu * (mu / 2 + scaled) * 10**power
    with mpmath.workdps(400):
        true = exact_delta(mu, at)
        if true > 1e-300:
            assert abs(gaussian_delta(mu, at) / true - 1) < 1e-12


@pytest.mark.parametrize(("mu", "delta"), GRID)
def test_epsilon_has_thirteen_digits(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60 - int(math.log10(delta))):
        if exact_delta(mu, 0.0) <= delta:
            assert epsilon == 0.0
            return
        at = mpmath.mpf(float(epsilon))
        slope = mpmath.exp(at) * mpmath.ncdf(-mpmath.mpf(mu) / 2 - at / mu)
        error = abs(exact_delta(mu, epsilon) - mpmath.mpf(delta)) / slope
    assert error < 1e-13 * epsilon


@pytest.mark.parametrize("below", [1e-1, 1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 3.0])
def test_epsilon_near_zero_has_a_small_absolute_error(mu, below):
    delta = float(gaussian_delta(mu, 0.0)) * (1 - below)
    epsilon = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60):
        slope = mpmath.exp(float(epsilon)) * mpmath.ncdf(-mpmath.mpf(mu) / 2 - float(epsilon) / mu)
        error = abs(exact_delta(mu, epsilon) - mpmath.mpf(delta)) / slope
    assert error < max(1e-15 * mu, 1e-13 * epsilon)


def test_the_logarithm_goes_on_where_delta_underflows():
    assert gaussian_delta(1.0, 40.0) == 0.0
    with mpmath.workdps(800):
        true = float(mpmath.log(exact_delta(1.0, 40.0)))
    assert log_gaussian_delta(1.0, 40.0) == pytest.approx(true, rel=1e-15)
    a = np.geomspace(1e3, 1e13, 99)  # epsilon / mu: there delta is phi(a) mu / a^2
    log_delta = -(a**2) / 2 - math.log(2 * math.pi) / 2 + np.log(1e-14 / a**2)
    np.testing.assert_allclose(log_gaussian_delta(1e-14, a * 1e-14), log_delta, rtol=1e-11)


@pytest.mark.parametrize("row", [row for row in MU if "eps" in row], ids=str)
def test_reference_epsilons(row):
    ours = gaussian_epsilon(row["mu"], row["delta"])
    assert ours == pytest.approx(float(row["eps"]), rel=1e-14)


@pytest.mark.parametrize("row", [row for row in MU if "eps_in" in row], ids=str)
def test_reference_deltas(row):
    ours = gaussian_delta(row["mu"], row["eps_in"])
    assert ours == pytest.approx(float(row["delta_out"]), rel=1e-14)


@pytest.mark.parametrize("row", VECTORS["calibration"]["clt_mu"], ids=lambda row: str(row["rate"]))
def test_reference_mu_of_the_central_limit_theorem(row):
    ours = mu_of((sampled(row["noise_multiplier"], row["rate"], row["steps"]),))
    assert ours.mu == pytest.approx(row["mu_poisson"], rel=1e-14)
    assert not ours.exact


@pytest.mark.parametrize(
    "row",
    [row for row in VECTORS["vectors"] if row["cls"].startswith("full-batch gaussian")],
    ids=lambda row: row["id"],
)
def test_full_batch_logs_are_exact(row):
    log = tuple(full(part["noise_multiplier"], part["steps"]) for part in row["log"])
    assert mu_of(log).exact
    assert gdp_epsilon(log, row["delta"]) == pytest.approx(row["eps_ref"], rel=1e-13)
    if row["eps_ref"]:
        assert gdp_delta(log, row["eps_ref"]) == pytest.approx(row["delta"], rel=1e-9)


def test_the_limit_under_reports_by_seventy_percent():
    """The docstrings' warning, held against the true value: an exact figure of 0.193544."""
    claimed = gdp_epsilon((sampled(1.0, 0.001, 100),), 1e-8)
    assert claimed == pytest.approx(0.058813, rel=1e-4)
    assert claimed < 0.31 * 0.193544


@given(mus, deltas)
def test_epsilon_and_delta_are_inverse(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon > 0:
        # What one unit in epsilon's last place moves delta by: its slope is at most 40 / mu.
        slack = 1e-12 + 40 / mu * np.spacing(epsilon)
        assert gaussian_delta(mu, epsilon) == pytest.approx(delta, rel=slack)
    else:
        assert gaussian_delta(mu, 0.0) <= delta * (1 + 1e-12)


@given(mus, deltas, st.floats(1.001, 3.0))
def test_epsilon_rises_with_mu_and_falls_with_delta(mu, delta, factor):
    epsilon = gaussian_epsilon(mu, delta)
    assert 0 <= epsilon <= gaussian_epsilon(mu * factor, delta)
    assert gaussian_epsilon(mu, min(0.95, delta * factor)) <= epsilon
    assert gaussian_delta(mu, epsilon) <= gaussian_delta(mu * factor, epsilon)
    assert gaussian_delta(mu, epsilon * factor) <= gaussian_delta(mu, epsilon)


@given(mus, st.floats(0, 50))
def test_a_negative_epsilon_is_the_other_direction(mu, epsilon):
    mirrored = -math.expm1(-epsilon) + math.exp(-epsilon) * gaussian_delta(mu, epsilon)
    assert gaussian_delta(mu, -epsilon) == pytest.approx(mirrored, rel=1e-13)


def test_arrays_broadcast_and_numbers_stay_numbers():
    mu, epsilon = np.array([[0.5], [2.0]]), np.array([-1.0, 0.0, 3.0])
    both = gaussian_delta(mu, epsilon)
    assert both.shape == (2, 3)
    assert both[1, 2] == gaussian_delta(2.0, 3.0)
    assert gaussian_epsilon(mu, [0.1, 0.2, 0.3]).shape == (2, 3)
    assert gaussian_epsilon(np.zeros(0), 0.5).shape == (0,)
    assert isinstance(gaussian_delta(1, 1), float)
    assert isinstance(gaussian_epsilon(1, 0.5), float)


def test_the_ends_of_the_range():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(gaussian_delta(0.0, [0.0, 1.0, math.inf]), 0.0)
        assert gaussian_delta(0.0, -2.0) == pytest.approx(-math.expm1(-2.0), rel=1e-15)
        assert gaussian_delta(1.0, math.inf) == 0.0
        assert gaussian_delta(1.0, -math.inf) == gaussian_delta(math.inf, 5.0) == 1.0
        assert gaussian_epsilon(0.0, 1e-300) == 0.0
        assert gaussian_epsilon(math.inf, 0.5) == math.inf
        for mu in (1e-320, 1e-200, 1e8, 1e15, 1e100, 1e150, 1e200):
            for delta in (1e-300, 0.1):
                epsilon = gaussian_epsilon(mu, delta)
                assert not math.isnan(epsilon)
                assert epsilon <= max(mu, 1.0) * mu / 2 * 1.1 + 40 * mu
                assert 0.0 <= gaussian_delta(mu, epsilon) <= 1.0


@pytest.mark.parametrize("function", [gaussian_delta, log_gaussian_delta, gaussian_epsilon])
def test_bad_numbers_are_refused(function):
    for mu, other in ((-1.0, 0.5), (math.nan, 0.5), (1.0, math.nan), ([1.0, -1.0], 0.5)):
        with pytest.raises(ValueError, match="Expected"):
            function(mu, other)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, [0.5, 1.5]])
def test_a_delta_outside_the_open_unit_interval_is_refused(delta):
    with pytest.raises(ValueError, match="0 < delta < 1"):
        gaussian_epsilon(1.0, delta)


def test_mu_composes_as_a_hypotenuse():
    log = (full(2.0, 3), sampled(4.0, 1.0, 5), full(0.5))
    assert mu_of(log).mu == pytest.approx(math.sqrt(3 / 4 + 5 / 16 + 4), rel=1e-15)
    assert mu_of(log).exact
    mixed = mu_of((*log, sampled(2.0, 0.1, 10)))
    expected = math.sqrt(3 / 4 + 5 / 16 + 4 + 10 * 0.01 * math.expm1(0.25))
    assert mixed == GDP(pytest.approx(expected, rel=1e-15), False)


@given(st.lists(st.builds(full, noises, st.integers(1, 1000)), max_size=4).map(Log), noises)
def test_order_and_count_do_not_matter(log, noise):
    assert mu_of(log[::-1]).mu == pytest.approx(mu_of(log).mu, rel=1e-14)
    event = sampled(noise, 0.3)
    together = mu_of((*log, replace(event, count=3))).mu
    assert together == pytest.approx(mu_of((event, *log, event, event)).mu, rel=1e-14)


@given(
    st.permutations([full(3.0, 2), full(3.0), sampled(0.7, 0.3, 5), sampled(0.7, 0.3), full(0.9)])
)
def test_no_order_of_the_events_rounds_differently(events):
    assert mu_of(Log(events)) == mu_of(Log(sorted(events, key=repr)))


def test_the_relation_is_the_one_accounted():
    assert mu_of((full(2.0, relation="zero_out"),)).mu == 0.5
    assert mu_of((full(2.0, relation="replace_one"),)).mu == 1.0
    assert mu_of((sampled(2.0, 1.0, relation="replace_one"),)) == GDP(1.0, True)
    zero_out = sampled(2.0, 0.1, relation="zero_out")
    assert mu_of((zero_out,)) == mu_of((sampled(2.0, 0.1),))


def test_nothing_released_is_exactly_zero_and_no_noise_is_infinite():
    for log in ((), (sampled(1.0, 0.0),), (full(math.inf),), (sampled(math.inf, 0.5),)):
        assert mu_of(log) == GDP(0.0, True)
        assert gdp_epsilon(log, 1e-9) == gdp_delta(log, 0.0) == 0.0
    for log in ((full(0.0),), (sampled(0.0, 0.1),)):
        assert mu_of(log).mu == math.inf
        assert gdp_epsilon(log, 0.1) == math.inf
        assert gdp_delta(log, 5.0) == 1.0


def test_mu_overflows_only_where_it_must():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mu_of((full(1e-200), full(1e-200))).mu == pytest.approx(math.sqrt(2) * 1e200)
        assert mu_of((full(1e200, count=10**300),)).mu == pytest.approx(1e-50)
        assert mu_of((sampled(1e200, 0.5, count=10**300),)).mu == pytest.approx(0.5e-50)
        assert mu_of((sampled(0.03, 0.5),)).mu == pytest.approx(0.5 * math.exp(1 / 0.0018))
        assert mu_of((sampled(0.01, 0.5),)).mu == math.inf
        assert mu_of((sampled(5e-324, 0.5),)).mu == math.inf
        assert mu_of((full(5e-324),)).mu == math.inf


@pytest.mark.parametrize(
    "event",
    [
        sampled(mechanism="laplace"),
        full(mechanism="laplace"),
        sampled(sampling="fixed_without_replacement"),
        sampled(sampling="truncated_poisson"),
        sampled(relation="replace_one"),
    ],
    ids=repr,
)
def test_an_event_without_a_formula_is_refused(event):
    with pytest.raises(ValueError, match="for the 'gdp' accountant"):
        mu_of((event,))
