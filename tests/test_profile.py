"""Profiles and attacks: closed forms, an attack on one step by its thresholds, and the laws."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf, ndtr, ndtri

from dpfunc import Log, StepEvent
from dpfunc.accounting.gdp import gaussian_delta, gaussian_epsilon
from dpfunc.accounting.pld import delta_bounds, epsilon_bounds
from dpfunc.accounting.profile import (
    attack_advantage,
    gaussian_mu,
    gdp_summary,
    posterior_odds,
    privacy_profile,
    trade_off,
)

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("epsilon_vectors.json").read_text())
MUS = [1e-4, 0.01, 0.1, 0.5, 1.0, 3.0, 10.0, 200.0]
RATES = np.concatenate(
    [[0.0], np.geomspace(1e-9, 0.01, 12), np.linspace(0.02, 0.98, 25), [0.999, 1 - 1e-9, 1.0]]
)
NOTHING = {
    "empty": (),
    "no steps": (StepEvent(noise_multiplier=1.0, sampling_prob=0.5, count=0),),
    "probability 0": (StepEvent(noise_multiplier=1.0, sampling_prob=0.0, count=9),),
    "infinite noise": (StepEvent(noise_multiplier=math.inf, sampling_prob=0.5, count=9),),
}
nothing = pytest.mark.parametrize("log", NOTHING.values(), ids=NOTHING)
NO_NOISE = (StepEvent(noise_multiplier=0.0, sampling_prob=1.0),)
BAD_ARRAYS = [
    ([math.nan], ValueError),
    (math.nan, ValueError),
    ([-1e-9], ValueError),
    ([math.inf], ValueError),
    (True, TypeError),
    ([True], TypeError),
    ("0.5", TypeError),
    (["0.5"], TypeError),
    ([None], TypeError),
]
bad_arrays = pytest.mark.parametrize(("bad", "error"), BAD_ARRAYS, ids=repr)


def run(noise_multiplier=1.0, sampling_prob=0.01, count=1000, **fields):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **fields
    )


def full(mu):
    return (run(1 / mu, 1.0, 1, sampling="none"),)


def one_step(noise, prob):
    """Error rates of every attack on one step that calls what is above a threshold "in"."""
    x = np.linspace(-40.0, 40.0, 40_001) * noise
    false_positive = ndtr(-x / noise)
    false_negative = (1 - prob) * ndtr(x / noise) + prob * ndtr((x - 1) / noise)
    return false_positive, false_negative


def log_of(row):
    return Log(
        run(
            step["noise_multiplier"],
            step["rate"],
            step["steps"],
            mechanism=step["mechanism"],
            sampling=step["sampling"],
        )
        for step in row["log"]
    )


def run_of(mu, sampling_prob, count):
    """A run of about that mu, and of many steps: logs that are accounted in a millisecond."""
    noise = max(1.5, sampling_prob * math.sqrt(count) / mu)
    return run(noise, sampling_prob, count)


events = st.builds(
    run_of,
    mu=st.floats(0.1, 1.5),
    sampling_prob=st.floats(-1.7, 0).map(lambda e: 10.0**e),
    count=st.integers(2000, 50_000),
)
logs = st.lists(events, min_size=1, max_size=2).map(Log)
steps_of_one = pytest.mark.parametrize(
    ("noise", "prob"), [(1.0, 0.01), (0.6, 0.1), (2.0, 0.5), (0.8, 1e-3), (1.5, 1.0)]
)


class TestPrivacyProfile:
    @pytest.mark.parametrize("mu", MUS)
    def test_lower_and_upper_enclose_the_closed_form_of_full_batches(self, mu):
        epsilons, lower, upper = privacy_profile(full(mu))
        exact = gaussian_delta(mu, epsilons)
        assert (lower <= exact).all()
        assert (exact <= upper).all()
        np.testing.assert_allclose(upper, lower, rtol=1e-10)

    @steps_of_one
    def test_lower_and_upper_enclose_what_thresholds_attain_on_one_step(self, noise, prob):
        a, b = one_step(noise, prob)
        epsilons, lower, upper = privacy_profile((run(noise, prob, 1),))
        grown = np.exp(epsilons)[:, None]
        attained = np.maximum(1 - b - grown * a, 1 - a - grown * b).max(1)
        assert (upper >= attained - 1e-15).all()
        np.testing.assert_allclose(lower, attained, rtol=1e-4, atol=1e-13)

    @pytest.mark.parametrize(
        "row",
        [r for r in GOLDEN["vectors"] if r["eps_ref"] > 0 and r["log"][0]["steps"] >= 1000],
        ids=lambda row: row["id"],
    )
    def test_lower_and_upper_enclose_the_references(self, row):
        _, lower, upper = privacy_profile(log_of(row), epsilons=row["eps_ref"])
        assert lower <= row["delta"] * (1 + 1e-9)
        assert upper >= row["delta"] * (1 - 1e-9)
        assert upper - lower <= 1e-4 * row["delta"]

    @given(logs)
    @settings(max_examples=5)
    def test_both_fall_as_epsilon_rises(self, log):
        epsilons, lower, upper = privacy_profile(log)
        assert epsilons[0] == 0.0
        assert (np.diff(epsilons) > 0).all()
        assert (lower >= 0).all()
        assert (lower <= upper).all()
        assert (upper <= 1).all()
        assert (np.diff(lower) <= 0).all()
        assert (np.diff(upper) <= 0).all()
        assert upper[-1] < 3e-12

    @given(logs, st.lists(st.floats(0, 8), min_size=1, max_size=6), st.randoms())
    @settings(max_examples=5)
    def test_each_point_is_at_least_as_tight_as_its_own_bounds(self, log, epsilons, random):
        random.shuffle(epsilons)
        _, lower, upper = privacy_profile(log, epsilons=epsilons)
        alone = delta_bounds(log, epsilon=epsilons)
        assert (lower >= alone[0]).all()
        assert (upper <= alone[1]).all()
        np.testing.assert_allclose(upper, alone[1], rtol=1e-5, atol=1e-290)

    def test_shapes_are_those_of_epsilons(self):
        for epsilons in (0.5, [], [3, 1, 2], [[0.0, 1.0], [2.0, -0.0]], np.zeros((0, 2))):
            shape = np.shape(epsilons)
            profile = privacy_profile((run(),), epsilons=epsilons)
            assert {array.shape for array in profile} == {shape}
            assert {array.dtype for array in profile} == {np.dtype(np.float64)}

    @nothing
    def test_nothing_released_gives_zeros(self, log):
        for epsilons in (None, [0.0, 1.0]):
            _, lower, upper = privacy_profile(log, epsilons=epsilons)
            assert lower.size
            assert not lower.any()
            assert not upper.any()

    def test_zero_noise_gives_ones(self):
        _, lower, upper = privacy_profile(NO_NOISE, epsilons=[0.0, 5.0])
        assert lower.tolist() == upper.tolist() == [1.0, 1.0]
        assert privacy_profile(NO_NOISE).upper.tolist() == [1.0]

    @bad_arrays
    def test_bad_epsilons_are_refused_by_name(self, bad, error):
        with pytest.raises(error, match="Expected epsilon"):
            privacy_profile((run(),), epsilons=bad)


class TestTradeOff:
    @pytest.mark.parametrize("mu", MUS)
    @pytest.mark.parametrize("rates", [RATES, 0.5, [1e-6], [0.3, 0.999], None], ids=str)
    def test_full_batches_have_the_exact_curve(self, mu, rates):
        rates, missed = trade_off(full(mu), false_positive_rates=rates)
        exact = ndtr(-ndtri(rates) - mu)
        assert (missed <= exact + 1e-15).all()
        np.testing.assert_allclose(missed, exact, rtol=0, atol=1e-7)

    @steps_of_one
    def test_no_attack_by_thresholds_on_one_step_does_better(self, noise, prob):
        a, b = one_step(noise, prob)
        for positive, negative in ((a, b), (b, a)):
            some = np.unique(np.linspace(0, len(a) - 1, 101).astype(int))
            _, missed = trade_off((run(noise, prob, 1),), false_positive_rates=positive[some])
            assert (missed <= negative[some] + 1e-15).all()

    @steps_of_one
    def test_some_attack_by_thresholds_on_one_step_does_as_well(self, noise, prob):
        a, b = one_step(noise, prob)
        rates, missed = trade_off((run(noise, prob, 1),))
        # Below both curves and convex: the highest of the lines that touch them from below.
        powers = np.geomspace(1e-6, 12, 1000)
        slopes = np.exp(np.concatenate([-powers, [0.0], powers]))
        touch = np.array([min((b + s * a).min(), (a + s * b).min()) for s in slopes])
        curve = np.array([(touch - slopes * rate).max() for rate in rates])
        np.testing.assert_allclose(missed, np.maximum(curve, 0), rtol=0, atol=5e-5)

    @given(logs, st.lists(st.floats(0, 5), min_size=1, max_size=4))
    @settings(max_examples=5)
    def test_it_touches_the_line_of_every_epsilon_and_delta(self, log, epsilons):
        """At e^epsilon, least of false negatives + e^epsilon false positives: 1 - delta."""
        fine = np.concatenate([np.geomspace(1e-9, 0.1, 200), np.linspace(0.1, 1.0, 200)])
        rates, missed = trade_off(log, false_positive_rates=np.append(0.0, fine))
        for epsilon in epsilons:
            lower, upper = delta_bounds(log, epsilon=epsilon)
            for one, other in ((rates, missed), (missed, rates)):
                least = (other + math.exp(epsilon) * one).min()
                assert least >= 1 - upper - 1e-6 * math.exp(epsilon)
                assert least <= 1 - lower + 2e-3  # for the steps of the rates

    @given(logs)
    @settings(max_examples=5)
    def test_it_falls_is_convex_and_not_above_the_diagonal(self, log):
        rates, missed = trade_off(log, false_positive_rates=RATES)
        assert (missed >= 0).all()
        assert (missed <= 1 - rates).all()
        assert (np.diff(missed) <= 1e-15).all()
        chord = missed[:-2] + (missed[2:] - missed[:-2]) * (
            (rates[1:-1] - rates[:-2]) / (rates[2:] - rates[:-2])
        )
        assert (missed[1:-1] <= chord + 1e-15).all()

    @given(events, st.integers(2, 3))
    @settings(max_examples=5)
    def test_more_steps_lower_it(self, event, times):
        more = replace(event, count=times * event.count)
        assert (trade_off((more,))[1] <= trade_off((event,))[1] + 1e-6).all()

    @nothing
    def test_nothing_released_gives_the_diagonal(self, log):
        rates, missed = trade_off(log, false_positive_rates=RATES)
        np.testing.assert_allclose(missed, 1 - rates, rtol=1e-14)
        assert (missed <= 1 - rates).all()

    def test_zero_noise_gives_zeros(self):
        assert not trade_off(NO_NOISE).false_negative_rates.any()

    def test_the_smallest_rates_stand(self):
        rates = np.array([5e-324, 1e-300, 1e-100, 1 - 2.0**-53])
        missed = trade_off((run(),), false_positive_rates=rates).false_negative_rates
        assert (missed > [0.99, 0.99, 0.99, 0.0]).all()
        assert (missed <= 1 - rates).all()

    def test_shapes_are_those_of_the_rates(self):
        for rates in (0.5, [], [0, 1], [[0.0, 0.1], [0.2, -0.0]], np.zeros((0, 2))):
            curve = trade_off((run(),), false_positive_rates=rates)
            assert {array.shape for array in curve} == {np.shape(rates)}
            assert {array.dtype for array in curve} == {np.dtype(np.float64)}

    @bad_arrays
    def test_bad_rates_are_refused_by_name(self, bad, error):
        with pytest.raises(error, match="Expected false_positive_rates"):
            trade_off((run(),), false_positive_rates=bad)


class TestAttackAdvantage:
    @pytest.mark.parametrize("mu", MUS)
    def test_full_batches_have_the_error_function(self, mu):
        exact = erf(mu / math.sqrt(8))
        assert exact <= attack_advantage(full(mu)) <= min(1.0, exact * (1 + 1e-10))

    @steps_of_one
    def test_no_threshold_on_one_step_has_a_larger_advantage(self, noise, prob):
        a, b = one_step(noise, prob)
        assert attack_advantage((run(noise, prob, 1),)) == pytest.approx((1 - a - b).max())

    @given(logs)
    @settings(max_examples=5)
    def test_it_is_the_greatest_distance_of_the_curve_from_the_diagonal(self, log):
        rates, missed = trade_off(log)
        advantage = attack_advantage(log)
        assert (1 - rates - missed <= advantage + 1e-15).all()
        assert (1 - rates - missed).max() == pytest.approx(advantage, abs=1e-3)

    @nothing
    def test_nothing_released_gives_exactly_zero(self, log):
        assert attack_advantage(log) == 0.0

    def test_zero_noise_gives_one(self):
        assert attack_advantage(NO_NOISE) == 1.0


class TestPosteriorOdds:
    @pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 3.0, 10.0])
    @pytest.mark.parametrize("rate", [1e-9, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-6])
    def test_full_batches_have_the_exact_odds(self, mu, rate):
        exact = float(ndtr(mu + ndtri(rate))) / rate * 0.2 / 0.8
        odds = posterior_odds(full(mu), prior=0.2, false_positive_rate=rate)
        assert exact * (1 - 1e-13) <= odds <= exact * (1 + 1e-6)

    @given(logs, st.floats(-9, -0.01), st.floats(0.01, 0.99))
    @settings(max_examples=5)
    def test_they_are_what_the_trade_off_allows_and_no_epsilon_and_delta_allows_less(
        self, log, exponent, prior
    ):
        rate, before = 10.0**exponent, prior / (1 - prior)
        odds = posterior_odds(log, prior=prior, false_positive_rate=rate)
        missed = trade_off(log, false_positive_rates=rate).false_negative_rates
        assert odds == pytest.approx(before * (1 - missed) / rate, rel=1e-15 / rate + 1e-12)
        assert before <= odds <= before / rate * (1 + 1e-12)
        for epsilon, _, delta in zip(*privacy_profile(log), strict=True):
            assert odds <= before * (math.exp(min(epsilon, 700)) + delta / rate) * (1 + 1e-6)

    @given(logs, st.floats(-9, -0.1))
    @settings(max_examples=5)
    def test_a_larger_false_positive_rate_allows_less(self, log, exponent):
        few, many = (
            posterior_odds(log, prior=0.3, false_positive_rate=10.0**e)
            for e in (exponent, exponent * 0.9)
        )
        assert many <= few * (1 + 1e-6)

    @nothing
    def test_nothing_released_leaves_the_prior_odds(self, log):
        odds = posterior_odds(log, prior=0.2, false_positive_rate=0.01)
        assert 0.25 <= odds <= 0.25 * (1 + 1e-12)

    def test_zero_noise_leaves_the_false_positives_alone(self):
        odds = posterior_odds(NO_NOISE, prior=0.5, false_positive_rate=0.01)
        assert odds == pytest.approx(100.0, rel=1e-12)

    @pytest.mark.parametrize("name", ["prior", "false_positive_rate"])
    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            (0.0, ValueError),
            (1.0, ValueError),
            (-0.1, ValueError),
            (math.nan, ValueError),
            (math.inf, ValueError),
            (True, TypeError),
            ("0.5", TypeError),
            (None, TypeError),
        ],
    )
    def test_bad_input_is_refused_by_name(self, name, bad, error):
        good = {"prior": 0.5, "false_positive_rate": 0.01}
        with pytest.raises(error, match=name):
            posterior_odds((run(),), **{**good, name: bad})


class TestGdpSummary:
    def test_the_example_of_gomez_et_al(self):
        """arXiv:2503.10945, De et al. on CIFAR-10; their package gdpnum prints 1.5686, 0.0010."""
        mu, regret = gdp_summary((run(9.4, 2**14 / 50_000, 2000),))
        assert mu == pytest.approx(1.57, abs=0.005)
        assert regret == pytest.approx(1e-3, abs=5e-4)
        at_theirs, _ = gdp_summary((run(9.4, 0.328, 2000),), deltas=1e-7)
        assert at_theirs == pytest.approx(1.5686, abs=1e-4)

    @pytest.mark.parametrize("mu", MUS)
    @pytest.mark.parametrize("deltas", [None, [1e-5, 1e-8], 1e-100], ids=str)
    def test_full_batches_have_their_own_mu_and_no_regret(self, mu, deltas):
        summary = gdp_summary(full(mu), deltas=deltas)
        assert summary.mu == pytest.approx(mu, rel=1e-9)
        assert summary.mu >= mu
        assert 0 <= summary.regret < 1e-9

    @given(logs, st.lists(st.floats(-12, -0.5), min_size=1, max_size=4))
    @settings(max_examples=5)
    def test_at_each_delta_epsilon_is_at_least_that_of_the_log(self, log, exponents):
        deltas = 10.0 ** np.array(exponents)
        mu, _ = gdp_summary(log, deltas=deltas)
        _, upper = epsilon_bounds(log, delta=deltas)
        allowed = gaussian_epsilon(mu, deltas)
        assert (allowed >= upper * (1 - 1e-11)).all()
        if upper.any():  # and some delta needs that much
            assert (gaussian_epsilon(mu * (1 - 1e-5), deltas) < upper).any()

    @given(logs)
    @settings(max_examples=4)
    def test_regret_moves_the_curve_of_the_log_below_that_of_mu(self, log):
        mu, regret = gdp_summary(log)
        assert 0 <= regret < 0.5
        rates = np.linspace(0.0, 1 - regret, 200)

        def above(moved):
            here = trade_off(log, false_positive_rates=np.minimum(rates + moved, 1.0))
            return (here.false_negative_rates - moved - ndtr(-ndtri(rates) - mu)).max()

        assert above(regret) <= 1e-3
        if regret > 1e-3:
            assert above(regret / 2) > 0

    def test_below_the_least_delta_it_is_no_bound(self):
        mu, _ = gdp_summary((run(),))
        assert gaussian_epsilon(mu, 1e-14) < epsilon_bounds((run(),), delta=1e-14)[0]

    @nothing
    def test_nothing_released_gives_zeros(self, log):
        assert gdp_summary(log) == gdp_summary(log, deltas=[1e-5, 0.5]) == (0.0, 0.0)

    def test_zero_noise_gives_infinity(self):
        assert gdp_summary(NO_NOISE) == gdp_summary(NO_NOISE, deltas=1e-5) == (math.inf, 0.0)

    def test_no_deltas_say_nothing(self):
        assert gdp_summary((run(),), deltas=[]).mu == 0.0

    @bad_arrays
    def test_bad_deltas_are_refused_by_name(self, bad, error):
        with pytest.raises(error, match="delta"):
            gdp_summary((run(),), deltas=bad)

    @pytest.mark.parametrize("bad", [0.0, 1.0, [0.1, 2.0]])
    def test_deltas_outside_the_open_unit_interval_are_refused(self, bad):
        with pytest.raises(ValueError, match="delta"):
            gdp_summary((run(),), deltas=bad)


class TestGaussianMu:
    @given(st.floats(-6, 3), st.floats(-300, -0.01))
    @settings(max_examples=20)
    def test_it_has_eleven_digits(self, epsilon_exponent, delta_exponent):
        epsilon, delta = 10.0**epsilon_exponent, min(10.0**delta_exponent, 0.999)
        mu = float(gaussian_mu(epsilon, delta))
        with mpmath.workdps(700):

            def profile(mu):
                near = mpmath.ncdf(mu / 2 - epsilon / mu)
                return near - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)

            assert profile(mpmath.mpf(mu) * (1 - mpmath.mpf("1e-11"))) < delta
            assert profile(mpmath.mpf(mu) * (1 + mpmath.mpf("1e-11"))) > delta

    @given(st.floats(-8, 3), st.floats(-300, -0.05))
    @settings(max_examples=40)
    def test_it_inverts_epsilon(self, mu_exponent, delta_exponent):
        mu, delta = 10.0**mu_exponent, 10.0**delta_exponent
        epsilon = gaussian_epsilon(mu, delta)
        if epsilon > mu / 100:
            assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-10)

    def test_at_epsilon_zero_it_inverts_the_error_function(self):
        deltas = np.array([1e-300, 1e-9, 0.1, 0.9, 1 - 1e-9])
        np.testing.assert_allclose(erf(gaussian_mu(0.0, deltas) / math.sqrt(8)), deltas, rtol=1e-14)

    def test_the_ends(self):
        assert gaussian_mu(2.0, 0.0) == gaussian_mu(0.0, 0.0) == gaussian_mu(math.inf, 0.0) == 0.0
        assert gaussian_mu(2.0, 1.0) == gaussian_mu(math.inf, 0.1) == math.inf
        assert 0 < gaussian_mu(0.0, 5e-324) < 1e-320 < gaussian_mu(1.0, 5e-324) < math.inf
        assert math.isfinite(gaussian_mu(1e308, 0.5))

    def test_shapes_broadcast(self):
        assert gaussian_mu([[0.0], [1.0]], [0.0, 0.1, 1.0]).shape == (2, 3)
        assert gaussian_mu([], 0.1).shape == (0,)
        assert np.ndim(gaussian_mu(1.0, 0.1)) == 0

    @pytest.mark.parametrize(("epsilon", "delta"), [(-1, 0.1), (math.nan, 0.1), (1, 1.1), (1, -1)])
    def test_numbers_out_of_range_are_refused(self, epsilon, delta):
        with pytest.raises(ValueError, match="Expected"):
            gaussian_mu(epsilon, delta)

    def test_what_is_no_number_is_refused(self):
        with pytest.raises(TypeError, match="Expected delta to hold numbers"):
            gaussian_mu(1.0, "0.1")
