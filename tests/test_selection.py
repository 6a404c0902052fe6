"""The best of several runs: dp-accounting's figures, brute force on a line, and the law of the number."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from dpfunc import StepEvent, epsilon
from dpfunc.accounting.rdp import ORDERS, rdp
from dpfunc.accounting.selection import Repeats, selection_epsilon, selection_rdp

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("selection.json").read_text())
POISSON = math.inf
LAWS = [(1.0, 0.0), (1.5, 0.0), (6.0, 0.0), (6.0, 0.5), (6.0, 1.0), (40.0, 3.0), (6.0, POISSON)]


def run(noise_multiplier=2.0, sampling_prob=0.01, count=1000, **fields):
    return StepEvent(
        noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, count=count, **fields
    )


def log_of(row):
    return (run(**{name: row[name] for name in ("noise_multiplier", "sampling_prob", "count")}),)


def repeats_of(row):
    return Repeats(expected_runs=row["expected_runs"], shape=float(row["shape"]))


def name_of(row):
    return "-".join(str(row[name]) for name in ("noise_multiplier", "expected_runs", "shape"))


repeats = st.builds(
    Repeats,
    expected_runs=st.floats(0, 3).map(lambda power: 10.0**power),
    shape=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 10.0, POISSON]),
)
logs = st.tuples(
    st.builds(run, st.floats(0.5, 20), st.sampled_from([1e-3, 0.1, 1.0]), st.integers(1, 500))
)
deltas = st.floats(-12, -1).map(lambda exponent: 10.0**exponent)


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=name_of)
def test_it_agrees_with_dp_accounting_which_chooses_from_fewer_orders(row):
    law = repeats_of(row)
    if row["stop_prob"]:
        assert law.stop_prob == pytest.approx(row["stop_prob"], rel=1e-8)
    ours = selection_rdp(log_of(row), law, GOLDEN["shown_orders"])
    theirs = np.array(row["rdp"])
    assert (ours <= theirs * 1.02).all()  # we have fewer orders to bound lower ones by
    spent = selection_epsilon(log_of(row), delta=row["delta"], repeats=law)
    assert spent <= row["epsilon"] * (1 + 1e-8)
    if law.shape != POISSON:  # for Poisson we also have Pinsker's bound
        np.testing.assert_allclose(ours, theirs, rtol=0.03)
        assert spent == pytest.approx(row["epsilon"], rel=0.02)


@pytest.mark.parametrize("noise", [0.7, 2.0, 10.0])
def test_the_poisson_price_is_the_formula_of_theorem_6(noise):
    """Full batch, where the divergence is order / (2 noise^2), over a fine grid of both orders."""
    runs, delta = 5, 1e-6
    a = 1 + np.geomspace(0.1, 1000, 400)
    b = 1 + np.geomspace(1e-2, 1e4, 4001)[:, None]
    at = np.log(a / (a - 1))
    log_deltas = (b - 1) * (b / 2 / noise**2 - at + np.log1p(-1 / b)) - np.log(b)
    pinsker = math.sqrt(1.01 / 4 / noise**2)
    inner = np.minimum(np.exp(np.minimum(log_deltas.min(0), 0)), pinsker)
    expected = a / 2 / noise**2 + math.log(runs) / (a - 1) + runs * inner
    log, law = (run(noise, 1.0, 1),), Repeats(expected_runs=runs, shape=POISSON)
    ours = selection_rdp(log, law, a.tolist())
    np.testing.assert_allclose(ours, np.minimum.accumulate(expected[::-1])[::-1], rtol=0.02)
    expected += np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    spent = selection_epsilon(log, delta=delta, repeats=law)
    assert spent == pytest.approx(expected.min(), rel=1e-3)


def released(law, log_q, below):
    """The log density of the best outcome, for one run's density and distribution function."""
    runs, shape = law.expected_runs, law.shape
    if shape == POISSON:
        return log_q + math.log(runs) + runs * (below - 1)
    go_on = 1 - law.stop_prob
    if go_on == 0:
        return log_q
    if shape == 0:
        norm = math.log(go_on / -math.log1p(-go_on))
    else:
        norm = math.log(shape * go_on / math.expm1(-shape * math.log1p(-go_on)))
    return log_q + norm - (1 + shape) * np.log1p(-go_on * below)


@pytest.mark.parametrize(("expected_runs", "shape"), LAWS)
@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("centre", "best"), [(0, 1), (1, 1), (0, -1), (1, -1)])
def test_no_selection_on_a_line_is_less_private(expected_runs, shape, noise, centre, best):
    """The largest, or least, of K Gaussian outcomes: its divergences, by quadrature."""
    law = Repeats(expected_runs=expected_runs, shape=shape)
    x, step = np.linspace(-60, 60, 400_001, retstep=True)
    centres = np.array([centre, 1 - centre]) / noise
    log_q = [-((x - c) ** 2) / 2 - math.log(2 * math.pi) / 2 for c in centres]
    a, b = (released(law, log_q[i], ndtr(best * (x - centres[i]))) for i in (0, 1))
    nothing = math.exp(-expected_runs) if shape == POISSON else 0.0
    log = (run(noise, 1.0, 1),)
    orders = [1.5, 3.0, 10.0]
    for order, bound in zip(orders, selection_rdp(log, law, orders), strict=True):
        total = np.exp(order * a + (1 - order) * b).sum() * step + nothing
        assert math.log(total) / (order - 1) <= bound * (1 + 1e-9) + 1e-9
    for delta in (1e-2, 1e-6):
        at = selection_epsilon(log, delta=delta, repeats=law)
        true = np.maximum(np.exp(a) - np.exp(at + b), 0).sum() * step
        assert true <= delta * (1 + 1e-6)


@given(logs, deltas, repeats, st.floats(1.0, 5.0))
def test_it_costs_at_least_one_run_and_rises_with_the_number(log, delta, law, factor):
    spent = selection_epsilon(log, delta=delta, repeats=law)
    assert spent >= epsilon(log, delta=delta, accountant="rdp") * (1 - 1e-6)
    more = replace(law, expected_runs=law.expected_runs * factor)
    assert selection_epsilon(log, delta=delta, repeats=more) >= spent * (1 - 1e-6)


@given(logs, deltas, st.sampled_from([0.0, 0.5, 1.0, 10.0]))
def test_one_expected_run_of_a_finite_shape_is_one_run(log, delta, shape):
    once = Repeats(expected_runs=1, shape=shape)
    spent = selection_epsilon(log, delta=delta, repeats=once)
    assert spent == pytest.approx(epsilon(log, delta=delta, accountant="rdp"), rel=1e-6)


@given(logs, repeats)
def test_the_divergence_rises_with_its_order_and_is_at_least_one_runs(log, law):
    orders = ORDERS[::3]
    ours = selection_rdp(log, law, orders)
    assert (np.diff(ours) >= 0).all()
    assert (ours >= rdp(log[0], orders)).all()
    assert selection_rdp(log, law, orders[::-1]).tolist() == ours[::-1].tolist()


def test_a_log_that_releases_nothing_is_exactly_zero_and_no_noise_is_infinite():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in (0.0, 1.0, POISSON):
            law = Repeats(expected_runs=20, shape=shape)
            for log in ((), (run(math.inf),), (run(sampling_prob=0.0),)):
                assert selection_epsilon(log, delta=1e-5, repeats=law) == 0.0
                assert selection_rdp(log, law, [2.0]).tolist() == [0.0]
            assert selection_epsilon((run(0.0),), delta=1e-5, repeats=law) == math.inf


@pytest.mark.parametrize("shape", [0.0, 0.3, 1.0, 7.0, POISSON])
@pytest.mark.parametrize("expected_runs", [1.0, 1.0 + 1e-9, 1.5, 20.0, 3000.0])
def test_the_law_sums_to_one_and_has_its_mean(expected_runs, shape):
    law = Repeats(expected_runs=expected_runs, shape=shape)
    k = np.arange(2**20)
    probability = law.probability(k)
    assert probability.sum() == pytest.approx(1, abs=1e-9)
    assert (probability * k).sum() == pytest.approx(expected_runs, rel=1e-9)
    assert (probability[0] > 0) == (shape == POISSON and expected_runs < 700)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 4.0])
def test_the_law_has_the_generating_function_of_its_definition(shape):
    law = Repeats(expected_runs=12.0, shape=shape)
    x, stop = 0.83, law.stop_prob
    ours = (law.probability(np.arange(1000)) * x ** np.arange(1000)).sum()
    if shape == 0:
        true = math.log1p((stop - 1) * x) / math.log(stop)
    else:
        true = ((1 - (1 - stop) * x) ** -shape - 1) / (stop**-shape - 1)
    assert ours == pytest.approx(true, rel=1e-9)


def test_known_laws():
    geometric = Repeats(expected_runs=4.0).probability([1, 2, 5])
    np.testing.assert_allclose(geometric, [0.25, 0.1875, 0.25 * 0.75**4], rtol=1e-12)
    poisson = Repeats(expected_runs=3.0, shape=POISSON).probability([0, 2])
    np.testing.assert_allclose(poisson, [math.exp(-3), 4.5 * math.exp(-3)], rtol=1e-12)


@given(repeats, st.floats(1e-9, 1 - 1e-9), st.floats(1e-9, 1 - 1e-9))
def test_the_number_of_runs_is_the_quantile(law, a, b):
    number = law.num_runs(a)
    assert number == law.num_runs(a)
    cumulated = law.probability(np.arange(number + 1)).sum()
    assert cumulated >= a - 1e-9
    assert cumulated - law.probability(number) <= a + 1e-9
    assert (number <= law.num_runs(b)) or a > b


@pytest.mark.parametrize("shape", [0.0, 0.3, 1.0, POISSON])
def test_the_quantile_of_many_runs(shape):
    law = Repeats(expected_runs=3000, shape=shape)
    cumulated = np.cumsum(law.probability(np.arange(2**20)))
    for uniform in (1e-6, 0.1, 0.9, 1 - 1e-4, 1 - 1e-6, 1 - 1e-8):
        number = law.num_runs(uniform)
        assert cumulated[number] >= uniform - 1e-11
        assert number == 0 or cumulated[number - 1] < uniform + 1e-11


def test_the_last_uniform_numbers_do_not_run_away():
    for shape in (0.0, 1.0, POISSON):
        law = Repeats(expected_runs=20, shape=shape)
        assert law.num_runs(1 - 2**-53) < 10_000
        assert law.num_runs(5e-324) == (0 if shape == POISSON else 1)


def test_numbers_of_runs_drawn_have_the_mean():
    law = Repeats(expected_runs=10.0, shape=0.5)
    rng = np.random.default_rng(20)
    drawn = [law.num_runs(u) for u in rng.uniform(size=4000)]
    k = np.arange(2000)
    deviation = math.sqrt((law.probability(k) * (k - 10.0) ** 2).sum() / 4000)
    assert abs(np.mean(drawn) - 10.0) < 5 * deviation


@pytest.mark.parametrize(
    "fields",
    [
        {"expected_runs": 0.5},
        {"expected_runs": 2e6},
        {"expected_runs": math.nan},
        {"expected_runs": 5, "shape": -0.1},
        {"expected_runs": 5, "shape": math.nan},
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match="Expected"):
        Repeats(**fields)


def test_wrong_arguments_are_refused():
    law = Repeats(expected_runs=5, shape=POISSON)
    with pytest.raises(ValueError, match="no stop_prob"):
        law.stop_prob
    for uniform in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="uniform"):
            law.num_runs(uniform)
    with pytest.raises(ValueError, match="whole numbers"):
        law.probability([1.5])
    for delta in (0.0, 1.0):
        with pytest.raises(ValueError, match="delta"):
            selection_epsilon((run(),), delta=delta, repeats=law)
    with pytest.raises(ValueError, match="orders above 1"):
        selection_rdp((run(),), law, [1.0])
    with pytest.raises(ValueError, match="'rdp' accountant"):
        selection_epsilon((run(relation="replace_one"),), delta=1e-5, repeats=law)
