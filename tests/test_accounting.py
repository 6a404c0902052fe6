"""RDP accounting: other libraries' figures, closed forms, 40-digit integrals, and the laws."""

import itertools
import json
import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dpfunc import (
    StepEvent,
    delta,
    epsilon,
)
from dpfunc.accounting import ACCOUNTANTS
from dpfunc.accounting.rdp import ORDERS, rdp, rdp_delta, rdp_epsilon
from dpfunc.accounting.statement import round_up
from dpfunc.testing import laws, strategies

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("rdp.json").read_text())


def event_of(row):
    fields = ("noise_multiplier", "sampling_prob", "count")
    return StepEvent(**{field: row[field] for field in fields})


def run(noise_multiplier=1.0, sampling_prob=0.01, count=1000, **fields):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **fields
    )


def spent(*log, delta=1e-5):
    return epsilon(log, delta=delta, accountant="rdp")


by_rdp = partial(epsilon, accountant="rdp")
events, logs, deltas = strategies.events(), strategies.logs(), strategies.deltas()


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(event_of(row))[10:60])
def test_rdp_and_epsilon_agree_with_dp_accounting(row):
    orders = GOLDEN["whole_orders"]
    np.testing.assert_allclose(rdp(event_of(row), orders), row["rdp_whole_orders"], rtol=1e-6)
    ours, _ = rdp_epsilon((event_of(row),), row["delta"], orders)
    assert ours == pytest.approx(row["epsilon_whole_orders"], rel=1e-6)


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(event_of(row))[10:60])
def test_fractional_orders_agree_with_the_signed_series_of_opacus(row):
    ours = rdp(replace(event_of(row), count=1), GOLDEN["fractional_orders"])
    theirs = np.array(row["opacus_rdp_fractional_orders"])
    # The series cancels: its own error is some 1e-14 in log A, whatever log A is.
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: str(event_of(row))[10:60])
def test_the_search_over_all_orders_is_never_above_the_default_list(row):
    ours = spent(event_of(row), delta=row["delta"])
    assert ours <= row["epsilon_default_orders"] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("noise", "prob", "order"),
    [
        (1.1, 0.00427, 1.1),
        (0.5, 0.01, 1.3),
        (3.0, 0.3, 1.7),
        (0.3, 0.01, 2.5),
        (1.0, 0.01, 7.3),
        (8.0, 0.001, 500.5),
        (4.0, 1e-4, 1.5),
        (0.1, 0.5, 3.3),
        (20.0, 0.9, 1000.7),
        (1.0, 1e-7, 5.5),
    ],
)
def test_rdp_is_the_integral_to_forty_digits_and_rounds_outward(noise, prob, order):
    with mpmath.workdps(40):
        s, q, a = mpmath.mpf(noise), mpmath.mpf(prob), mpmath.mpf(order)

        def integrand(x):
            return (1 - q + q * mpmath.exp(x / s - 1 / (2 * s * s))) ** a * mpmath.npdf(x)

        mode = order / noise
        ends = sorted({-40.0, -5.0, 0.0, 5.0, mode / 2, mode - 5, mode + 5, mode + 40})
        true = mpmath.log(mpmath.quad(integrand, ends, maxdegree=10)) / (a - 1)
        excess = (rdp(run(noise, prob, 1), [order])[0] - true) / true
    assert 0 <= excess < 1e-8


def test_full_batch_gaussian_is_order_over_twice_the_variance():
    full = run(2.0, 1.0, 3, sampling="none")
    np.testing.assert_allclose(rdp(full, [2.0, 8.0]), [0.75, 3.0])
    np.testing.assert_allclose(rdp(replace(full, sampling="poisson"), [2.0, 8.0]), [0.75, 3.0])


@given(logs, logs, deltas)
def test_logs_compose_in_any_order(a, b, d):
    laws.logs_compose(a, b, d, epsilon=by_rdp, rtol=1e-9)
    laws.costs_add_up(a, b)


@given(events, st.integers(2, 5), deltas)
def test_a_count_is_as_many_copies(event, copies, d):
    laws.counts_fold((event,), copies, d, epsilon=by_rdp, rtol=1e-12)
    many = replace(event, count=event.count * copies)
    orders = ORDERS[:20]
    np.testing.assert_allclose(rdp(many, orders), rdp(event, orders) * copies, rtol=1e-12)


@given(events, deltas, st.floats(1.0, 3.0))
def test_epsilon_falls_with_noise_and_delta_and_rises_with_sampling_and_steps(event, d, factor):
    assert spent(event, delta=d) < math.inf
    laws.epsilon_is_monotone(event, d, factor, epsilon=by_rdp, rtol=1e-6)


@given(events, deltas)
def test_delta_of_epsilon_returns_the_delta(event, d):
    value = spent(event, delta=d)
    assume(value > 0)
    back = delta((event,), epsilon=value, accountant="rdp")
    assert back == pytest.approx(d, rel=1e-3)


@given(logs, deltas)
def test_nothing_warns_and_nothing_is_nan(log, d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, order = rdp_epsilon(log, d)
        assert value >= 0
        assert (order > 1) == bool(log) or math.isnan(order)
        assert 0 <= rdp_delta(log, value) <= 1


@pytest.mark.parametrize(
    "nothing",
    [(), (run(count=0),), (run(sampling_prob=0.0),), (run(noise_multiplier=math.inf),)],
)
def test_nothing_released_costs_exactly_nothing(nothing):
    assert spent(*nothing) == 0.0
    assert delta(nothing, epsilon=0.0, accountant="rdp") == 0.0


def test_no_noise_costs_everything():
    assert spent(run(noise_multiplier=0.0)) == math.inf
    assert delta((run(noise_multiplier=0.0),), epsilon=5.0, accountant="rdp") == 1.0


@pytest.mark.parametrize("noise", [3e1, 3e3, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("prob", [1e-6, 1e-5, 1e-2])
def test_vanishing_steps_add_up_to_what_they_should(noise, prob):
    """Each step is nearly nothing; so many of them are a Gaussian of mu^2 = count q^2 / s^2."""
    count = round(noise**2 / (10 * prob**2))
    limit = spent(run(math.sqrt(10), 1.0, 1, sampling="none"))
    value = spent(run(noise, prob, count))
    assert value == pytest.approx(limit, rel=2e-3)
    if noise >= 3e3:
        assert value >= limit * (1 - 1e-6)


def test_epsilon_rises_with_sampling_up_to_the_full_batch():
    for noise in (1.0, 1e5, 1e9):
        count = round(noise**2)
        values = [spent(run(noise, q, count)) for q in (0.5, 0.9, 1 - 1e-9, 1.0)]
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(values))
        assert values[0] > 0


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        *[("delta", bad, ValueError) for bad in (0, 1, 2, -1e-5)],
        ("sampling_prob", 0, 0.0),
        ("sampling_prob", 1.5, ValueError),
        ("noise_multiplier", 0, math.inf),
        ("noise_multiplier", -1, ValueError),
        ("noise_multiplier", math.inf, 0.0),
        ("noise_multiplier", math.nan, ValueError),
        ("count", 0, 0.0),
        ("count", 2.5, TypeError),
        ("count", -5, ValueError),
    ],
)
def test_wrong_numbers_are_refused_by_name_and_nothing_released_costs_nothing(
    accountant, name, value, answer
):
    fields = {"noise_multiplier": 1.0, "sampling_prob": 0.01, "count": 100, "delta": 1e-5}
    fields[name] = value
    target = fields.pop("delta")
    if isinstance(answer, float):
        assert epsilon((StepEvent(**fields),), delta=target, accountant=accountant) == answer
    else:
        with pytest.raises(answer, match=name):
            epsilon((StepEvent(**fields),), delta=target, accountant=accountant)


@pytest.mark.parametrize(
    "event", [run(1e160, 0.5, 10), run(1e200, 1.0, 1), run(1e-200, 1.0, 1), run(0.0, 1.0, 0)]
)
def test_beyond_the_range_of_squares(event):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 <= spent(event) <= math.inf
        assert not np.isnan(rdp(event, [2.0])).any()


def test_no_orders_and_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="at least one order"):
        rdp_epsilon((run(),), 1e-5, [])
    with pytest.raises(ValueError, match="count <= 1e300"):
        run(count=10**400)
    with pytest.raises(TypeError, match="one StepEvent"):
        epsilon(run(), delta=1e-5, accountant="rdp")


@given(st.floats(1e-8, 1e8), st.integers(2, 8))
def test_a_printed_claim_is_never_below_the_number(value, digits):
    shown = float(round_up(value, digits))
    assert value <= shown <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-15)


def test_extremes_give_a_bound_and_no_warning():
    for event in (
        run(1e-3, 0.5, 1),
        run(1e4, 1e-6, 1),
        run(0.02, 1e-9, 10),
        run(5, 0.999999, 10**9),
    ):
        assert 0 <= spent(event) <= math.inf


@pytest.mark.parametrize("accountant", ["prv", "", None])
def test_an_unknown_accountant_is_answered_with_those_that_there_are(accountant):
    with pytest.raises(ValueError, match="accountant to be one of 'pld', 'rdp', 'gdp'"):
        epsilon((), delta=1e-5, accountant=accountant)


def test_the_default_accountant_is_pld():
    log = (run(),)
    assert epsilon(log, delta=1e-5) == epsilon(log, delta=1e-5, accountant="pld")
    assert epsilon(log, delta=1e-5) < epsilon(log, delta=1e-5, accountant="rdp")


@pytest.mark.parametrize("bad", [0, 1, -1e-5, 2, math.nan, math.inf])
def test_delta_outside_the_open_unit_interval_is_refused(bad):
    with pytest.raises(ValueError, match="0 < delta < 1"):
        spent(run(), delta=bad)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_epsilon_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="epsilon"):
        delta((run(),), epsilon=bad, accountant="rdp")


@pytest.mark.parametrize(
    "fields",
    [
        {"mechanism": "laplace"},
        {"sampling": "truncated_poisson"},
        {"sampling": "fixed_without_replacement"},
        {"relation": "replace_one"},
        {"relation": "zero_out"},
    ],
)
def test_an_event_without_a_bound_is_refused_and_not_guessed(fields):
    with pytest.raises(ValueError, match="does not guess"):
        spent(run(**fields))
