"""Calibration: references to eight digits, and that what fits fits while a little more would not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfunc import (
    Log,
    StepEvent,
    calibrate_noise_multiplier,
    calibrate_num_steps,
    calibrate_sampling_prob,
    epsilon,
)
from dpfunc.accounting.calibration import _last, remaining
from dpfunc.accounting.gdp import gaussian_epsilon

GOLDEN = json.loads(
    Path(__file__).with_name("golden").joinpath("epsilon_vectors.json").read_text()
)["calibration"]
A_LITTLE = {"pld": 1e-8, "gdp": 1e-8, "rdp": 1e-6}  # rdp: as far as its search over orders goes
MOST = 2**50 - 1
accountants = pytest.mark.parametrize("accountant", A_LITTLE)
golden_noises = pytest.mark.parametrize("row", GOLDEN["noise_multiplier"], ids=str)
golden_steps = pytest.mark.parametrize("row", GOLDEN["steps"], ids=str)
golden_probs = pytest.mark.parametrize("row", GOLDEN["sampling_rate"], ids=str)

GOOD = {
    calibrate_noise_multiplier: {"sampling_prob": 0.1, "num_steps": 10},
    calibrate_num_steps: {"sampling_prob": 0.1, "noise_multiplier": 1.0},
    calibrate_sampling_prob: {"num_steps": 10, "noise_multiplier": 1.0},
}
BAD = {
    "target_epsilon": [0, -1, math.inf, math.nan, True, "1", None],
    "delta": [0, 1, -1, 2, math.nan, True, "0.1", None],
    "sampling_prob": [0, -0.1, 1.5, math.nan, True, "0.1", None],
    "noise_multiplier": [-1, math.inf, math.nan, True, "1", None],
    "num_steps": [0, -1, 1.5, True, "10", None, math.nan],
}


def run(noise_multiplier=1.0, sampling_prob=0.01, count=1000, **fields):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **fields
    )


def spent(*log, delta=1e-5, accountant="pld"):
    return epsilon(log, delta=delta, accountant=accountant)


deltas = st.floats(-10, -2).map(lambda exponent: 10.0**exponent)
targets = st.floats(-1, 1.3).map(lambda exponent: 10.0**exponent)
probs = st.floats(-2, 0).map(lambda exponent: 10.0**exponent)


class TestNoise:
    @golden_noises
    def test_it_is_the_reference_to_eight_digits(self, row):
        noise = calibrate_noise_multiplier(
            target_epsilon=row["target_epsilon"],
            delta=row["delta"],
            sampling_prob=row["rate"],
            num_steps=row["steps"],
            sampling=row["sampling"],
        )
        assert noise == pytest.approx(row["noise_multiplier"], rel=1e-8)
        event = run(noise, row["rate"], row["steps"], sampling=row["sampling"])
        assert spent(event, delta=row["delta"]) <= row["target_epsilon"]

    @accountants
    @golden_noises
    def test_the_target_is_met_and_with_a_little_less_it_would_not_be(self, row, accountant):
        target, delta = row["target_epsilon"], row["delta"]
        noise = calibrate_noise_multiplier(
            target_epsilon=target,
            delta=delta,
            sampling_prob=row["rate"],
            num_steps=row["steps"],
            accountant=accountant,
        )
        for factor in (1.0, 1 - A_LITTLE[accountant]):
            event = run(noise * factor, row["rate"], row["steps"])
            fits = spent(event, delta=delta, accountant=accountant) <= target
            assert fits == (factor == 1.0)

    @given(targets, deltas, probs, st.integers(1000, 50_000))
    @settings(max_examples=12)
    def test_any_target_is_met_and_with_a_little_less_it_would_not_be(self, target, d, prob, steps):
        noise = calibrate_noise_multiplier(
            target_epsilon=target, delta=d, sampling_prob=prob, num_steps=steps
        )
        assert spent(run(noise, prob, steps), delta=d) <= target
        assert spent(run(noise * (1 - 1e-6), prob, steps), delta=d) > target

    @given(st.floats(0.2, 20), deltas, st.floats(1e-3, 1), st.integers(1, 5000))
    @settings(max_examples=20)
    def test_any_target_is_met_by_rdp(self, target, d, prob, steps):
        noise = calibrate_noise_multiplier(
            target_epsilon=target, delta=d, sampling_prob=prob, num_steps=steps, accountant="rdp"
        )
        assert spent(run(noise, prob, steps), delta=d, accountant="rdp") <= target
        less = run(noise * (1 - 1e-4), prob, steps)
        assert spent(less, delta=d, accountant="rdp") > target

    def test_fields_are_those_of_the_event(self):
        wanted = {"target_epsilon": 3.0, "delta": 1e-5, "sampling_prob": 1.0, "num_steps": 100}
        one = calibrate_noise_multiplier(**wanted, sampling="none")
        two = calibrate_noise_multiplier(**wanted, sampling="none", relation="replace_one")
        assert two == pytest.approx(2 * one, rel=1e-8)
        assert gaussian_epsilon(10 / one, 1e-5) == pytest.approx(3.0, rel=1e-8)
        laplace = calibrate_noise_multiplier(
            **{**wanted, "num_steps": 1}, mechanism="laplace", sampling="none"
        )
        # One Laplace release: delta = 1 - e^((epsilon - 1 / b) / 2)
        assert laplace == pytest.approx(1 / (3.0 - 2 * math.log1p(-1e-5)), rel=1e-6)

    def test_a_target_that_any_noise_meets_takes_the_least(self):
        noise = calibrate_noise_multiplier(
            target_epsilon=1e9, delta=1e-5, sampling_prob=1.0, num_steps=1
        )
        assert noise == pytest.approx(1e-3, rel=1e-12)

    @accountants
    def test_a_target_out_of_reach_is_an_error(self, accountant):
        with pytest.raises(ValueError, match="noise_multiplier <= 1e"):
            calibrate_noise_multiplier(
                target_epsilon=1e-9,
                delta=1e-9,
                sampling_prob=1.0,
                num_steps=10**9,
                accountant=accountant,
            )


class TestSteps:
    @golden_steps
    def test_they_are_the_reference(self, row):
        steps = calibrate_num_steps(
            target_epsilon=row["target_epsilon"],
            delta=row["delta"],
            noise_multiplier=row["noise_multiplier"],
            sampling_prob=row["rate"],
        )
        assert steps == row["max_steps"]

    @accountants
    @golden_steps
    def test_the_target_is_met_and_one_more_would_not(self, row, accountant):
        target, delta = row["target_epsilon"], row["delta"]
        steps = calibrate_num_steps(
            target_epsilon=target,
            delta=delta,
            noise_multiplier=row["noise_multiplier"],
            sampling_prob=row["rate"],
            accountant=accountant,
        )
        event = run(row["noise_multiplier"], row["rate"], steps)
        more = replace(event, count=steps + 1)
        assert spent(event, delta=delta, accountant=accountant) <= target
        assert spent(more, delta=delta, accountant=accountant) > target

    @accountants
    def test_not_one_may_fit(self, accountant):
        for noise in (0.0, 0.5):
            steps = calibrate_num_steps(
                target_epsilon=0.01,
                delta=1e-9,
                noise_multiplier=noise,
                sampling_prob=0.5,
                accountant=accountant,
            )
            assert steps == 0

    def test_full_batches_have_the_closed_form(self):
        steps = calibrate_num_steps(
            target_epsilon=1.0, delta=1e-5, noise_multiplier=300.0, sampling_prob=1.0
        )
        assert gaussian_epsilon(math.sqrt(steps) / 300, 1e-5) <= 1.0
        assert gaussian_epsilon(math.sqrt(steps + 1) / 300, 1e-5) > 1.0


class TestSamplingProb:
    @golden_probs
    def test_it_is_the_reference_to_eight_digits(self, row):
        prob = calibrate_sampling_prob(
            target_epsilon=row["target_epsilon"],
            delta=row["delta"],
            noise_multiplier=row["noise_multiplier"],
            num_steps=row["steps"],
        )
        assert prob == pytest.approx(row["max_rate"], rel=row["rel_tol"])

    @accountants
    @pytest.mark.parametrize("target", [0.3, 2.0, 8.0])
    def test_the_target_is_met_and_with_a_little_more_it_would_not_be(self, target, accountant):
        prob = calibrate_sampling_prob(
            target_epsilon=target,
            delta=1e-5,
            noise_multiplier=1.0,
            num_steps=1500,
            accountant=accountant,
        )
        more = prob * (1 + A_LITTLE[accountant])
        assert spent(run(1.0, prob, 1500), accountant=accountant) <= target
        assert spent(run(1.0, more, 1500), accountant=accountant) > target

    def test_where_the_full_batch_fits_it_is_one(self):
        prob = calibrate_sampling_prob(
            target_epsilon=1.0, delta=1e-5, noise_multiplier=1e3, num_steps=10
        )
        assert prob == 1.0

    @accountants
    def test_a_target_out_of_reach_is_an_error(self, accountant):
        with pytest.raises(ValueError, match="sampling_prob >= 1e-12"):
            calibrate_sampling_prob(
                target_epsilon=1e-9,
                delta=1e-300,
                noise_multiplier=0.01,
                num_steps=10**9,
                accountant=accountant,
            )


class TestRemaining:
    budget = {"target_epsilon": 1.0, "delta": 1e-5}  # noqa: RUF012

    @accountants
    def test_that_many_fit_and_one_more_does_not(self, accountant):
        log, event = Log((run(4.0, 0.1, 50), run(3.0, 0.02, 300))), run(2.0, 0.01, 7)
        count = remaining(log, event, **self.budget, accountant=accountant)
        assert count > 0
        assert spent(*log, replace(event, count=count), accountant=accountant) <= 1.0
        assert spent(*log, replace(event, count=count + 1), accountant=accountant) > 1.0

    @given(st.integers(0, 2433))
    @settings(max_examples=8)
    def test_what_ran_is_taken_off(self, count):
        event = run(2.0, 0.01, 1)
        assert remaining((replace(event, count=count),), event, **self.budget) == 2433 - count

    @golden_steps
    def test_of_an_empty_log_it_is_calibrate_num_steps(self, row):
        event = run(row["noise_multiplier"], row["rate"], 12345)
        budget = {"target_epsilon": row["target_epsilon"], "delta": row["delta"]}
        assert remaining((), event, **budget) == row["max_steps"]

    def test_a_log_beyond_the_target_leaves_nothing(self):
        spent_already = (run(2.0, 0.01, 3000),)
        for event in (run(), run(sampling_prob=0.0), run(noise_multiplier=0.0)):
            assert remaining(spent_already, event, **self.budget) == 0

    @accountants
    @pytest.mark.parametrize("fields", [{"sampling_prob": 0.0}, {"noise_multiplier": math.inf}])
    def test_steps_that_release_nothing_never_end(self, fields, accountant):
        for log in ((), (run(2.0, 0.01, 100),)):
            assert remaining(log, run(**fields), **self.budget, accountant=accountant) == MOST

    def test_it_leaves_the_log_alone(self):
        log = Log((run(2.0, 0.01, 100),))
        remaining(log, log[0], **self.budget)
        assert log == (run(2.0, 0.01, 100),)

    def test_an_event_that_the_accountant_refuses_is_refused(self):
        for accountant in ("rdp", "gdp"):
            with pytest.raises(ValueError, match="does not guess"):
                remaining((), run(mechanism="laplace"), **self.budget, accountant=accountant)

    @pytest.mark.parametrize("bad", [(), None, 1.0, (run(),), Log((run(),))], ids=repr)
    def test_what_is_no_event_is_refused(self, bad):
        with pytest.raises(TypeError, match="Expected event to be a StepEvent"):
            remaining((), bad, **self.budget)

    def test_one_event_is_no_log(self):
        with pytest.raises(TypeError, match="Expected a log"):
            remaining(run(), run(), **self.budget)

    @pytest.mark.parametrize("name", ["target_epsilon", "delta"])
    def test_bad_input_is_refused_by_name(self, name):
        for bad in BAD[name]:
            with pytest.raises((ValueError, TypeError), match=f"Expected .*{name}"):
                remaining((), run(), **{**self.budget, name: bad})


class TestAll:
    def test_the_search_ends_where_interpolation_says_nothing(self):
        tried = []

        def excess(place):
            tried.append(place)
            assert len(tried) < 120
            return -1e-300 if place <= 123_456_789 else 2.0

        assert _last(excess, 0, MOST, 1, 1.0) == 123_456_789

    @pytest.mark.parametrize("calibrate", GOOD, ids=lambda calibrate: calibrate.__name__)
    def test_bad_input_is_refused_by_name(self, calibrate):
        good = {"target_epsilon": 1.0, "delta": 1e-5, **GOOD[calibrate]}
        for name in good:
            for bad in BAD[name]:
                error = TypeError if isinstance(bad, (bool, str, type(None))) else ValueError
                if name == "num_steps" and isinstance(bad, float):
                    error = TypeError
                with pytest.raises(error, match=f"Expected .*{name}"):
                    calibrate(**{**good, name: bad})

    @pytest.mark.parametrize("calibrate", GOOD, ids=lambda calibrate: calibrate.__name__)
    def test_unknown_accountants_and_names_are_refused(self, calibrate):
        good = {"target_epsilon": 1.0, "delta": 1e-5, **GOOD[calibrate]}
        with pytest.raises(ValueError, match="Expected accountant to be one of"):
            calibrate(**good, accountant="prv")
        with pytest.raises(ValueError, match="Expected mechanism to be one of"):
            calibrate(**good, mechanism="cauchy")

    @pytest.mark.parametrize("target", [1e-300, 1e300])
    def test_extreme_targets_do_not_overflow(self, target):
        for accountant in A_LITTLE:
            steps = calibrate_num_steps(
                target_epsilon=target,
                delta=1e-5,
                noise_multiplier=1.0,
                sampling_prob=1.0,
                accountant=accountant,
            )
            assert steps == (0 if target < 1 else MOST)

    def test_sampling_none_takes_no_probability_but_one(self):
        with pytest.raises(ValueError, match="sampling_prob=1 with sampling='none'"):
            calibrate_noise_multiplier(
                target_epsilon=1.0, delta=1e-5, sampling_prob=0.5, num_steps=1, sampling="none"
            )
