"""Audits: bounds hold at their confidence, the recursion is the linear program, broken steps are caught."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linprog

import dpfunc
from dpfunc import DPSGD, audit, random
from dpfunc.audit.replicas import observe

DELTA = 1e-5


def exceeds_no_more_than_stated(exceeded, trials, confidence=0.95):
    return stats.binomtest(exceeded, trials, 1 - confidence, alternative="greater").pvalue > 1e-3


# Estimators: closed forms, oracles, coverage.


@given(st.integers(1, 60), st.data(), st.floats(0, 6), st.floats(1e-8, 0.2))
def test_the_one_run_p_value_is_the_sum_in_the_theorem(num, data, epsilon, delta):
    made = data.draw(st.integers(1, num))
    right = data.draw(st.integers(0, made))
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    law = [math.comb(made, k) * q**k * (1 - q) ** (made - k) for k in range(made + 1)]
    tail = math.fsum(law[right:])
    slope = max(math.fsum(law[max(0, right - i) : right]) / i for i in range(1, num + 1))
    expected = min(1.0, tail + 2 * num * delta * slope)
    found = audit.one_run_p_value(right, made, num, epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    pure = audit.one_run_p_value(right, made, num, epsilon=epsilon, delta=0.0)
    assert pure == pytest.approx(tail, rel=1e-9, abs=1e-12)


def most_probability(right, made, num, points):
    """max Pr[right guesses or more] over laws on 0..made that meet the curve, by linear programming."""
    rows, limits = [], []
    for t in range(1, made + 1):
        hit, flipped = np.zeros(made + 1), np.zeros(made + 1)
        for i in range(t, made + 1):
            hit[i] += i / num
            flipped[i - 1] += (made - i + 1) / num
        for epsilon, delta in zip(*points, strict=True):
            rows += [hit - math.exp(epsilon) * flipped, hit - math.exp(-epsilon) * flipped]
            limits += [delta, 1 - math.exp(-epsilon) * (1 - delta)]
    goal = -(np.arange(made + 1) >= right).astype(float)
    found = linprog(goal, rows, limits, np.ones((1, made + 1)), [1.0])
    return -found.fun


@settings(max_examples=60)
@example(1, None, 1.0, 0.05)
@given(st.integers(1, 12), st.data(), st.floats(0.1, 3.0), st.floats(0.02, 0.99))
def test_the_recursion_is_the_linear_program(num, data, mu, confidence):
    made = num if data is None else data.draw(st.integers(1, num))
    right = num if data is None else data.draw(st.integers(0, made))
    epsilons = np.array([0.0, 0.3, 1.0, 2.5])
    points = audit.Points(epsilons, dpfunc.gaussian_delta(mu, epsilons))
    most = most_probability(right, made, num, points)
    if abs(most - (1 - confidence)) < 1e-6:
        return
    refuted = audit.one_run_refutes(right, made, num, points=points, confidence=confidence)
    assert refuted == (most < 1 - confidence)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("made", [10, 64, 300])
def test_randomized_response_is_refuted_no_more_often_than_stated_exactly(epsilon, made):
    """Every number of right guesses is enumerated, under the mechanism that meets the bound."""
    law = stats.binom(made, 1 / (1 + math.exp(-epsilon)))
    for refuted in (
        lambda v: audit.one_run_p_value(v, made, made, epsilon=epsilon, delta=0.0) <= 0.05,
        lambda v: audit.one_run_refutes(
            v,
            made,
            made,
            points=audit.approximate_family(1e-12).points(epsilon),
            confidence=0.95,
        ),
    ):
        first = next((v for v in range(made + 1) if refuted(v)), made + 1)
        assert law.sf(first - 1) <= 0.05 * (1 + 1e-6)
        assert all(refuted(v) for v in range(first, made + 1))


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_covers_randomized_response_over_thousands_of_runs(epsilon):
    rng = np.random.default_rng(1)
    exceeded = 0
    for _ in range(2000):
        coins = rng.random(80) < 0.5
        kept = rng.random(80) < 1 / (1 + math.exp(-epsilon))
        said = np.where(kept, coins, ~coins) + 1e-6 * rng.random(80)
        if min(coins.sum(), (~coins).sum()) < 2:
            continue
        bound = audit.one_run(said[coins], said[~coins], delta=1e-9, num_guesses=60)
        exceeded += bound > epsilon
    assert exceeded > 0  # randomized response is the worst case: the bound is not idle
    assert exceeds_no_more_than_stated(exceeded, 2000)


def test_clopper_pearson_covers_randomized_response_over_thousands_of_runs():
    rng = np.random.default_rng(2)
    epsilon, exceeded = 1.0, {0.5: 0, None: 0}
    truth = 1 / (1 + math.exp(-epsilon))
    for _ in range(2000):
        inside, outside = rng.random(200) < truth, rng.random(200) >= truth
        for threshold in exceeded:
            bound = audit.clopper_pearson(inside, outside, delta=1e-9, threshold=threshold)
            exceeded[threshold] += bound > epsilon
    assert all(exceeds_no_more_than_stated(count, 2000) for count in exceeded.values())
    assert exceeded[0.5] > 0


@given(st.integers(2, 200), st.integers(2, 200), st.data(), st.floats(0.5, 0.99))
def test_clopper_pearson_is_made_of_exact_intervals(num_in, num_out, data, confidence):
    caught, false = data.draw(st.integers(0, num_in)), data.draw(st.integers(0, num_out))
    ends = [
        stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method="exact")
        for k, n in ((caught, num_in), (false, num_out))
    ]  # two-sided at the confidence is one-sided at half of the rest
    low, high = ends[0].low, ends[1].high
    candidates = [0.0]
    if low > DELTA and high > 0:
        candidates.append(math.log((low - DELTA) / high))
    if 1 - high > DELTA and low < 1:
        candidates.append(math.log((1 - high - DELTA) / (1 - low)))
    found = audit.clopper_pearson(
        np.arange(num_in) < caught,
        np.arange(num_out) < false,
        delta=DELTA,
        confidence=confidence,
        threshold=0.5,
    )
    assert found == pytest.approx(max(candidates), rel=1e-6, abs=1e-7)


def test_a_gaussian_fit_exceeds_at_exactly_the_stated_rate_for_normal_scores():
    rng = np.random.default_rng(3)
    for confidence in (0.95, 0.8):
        mu, trials = 1.2, 600
        truth = dpfunc.gaussian_epsilon(mu, DELTA)
        exceeded = sum(
            audit.gaussian_fit(
                3.0 * (rng.standard_normal(30) + mu) - 7.0,
                3.0 * rng.standard_normal(50) - 7.0,
                delta=DELTA,
                confidence=confidence,
            )
            > truth
            for _ in range(trials)
        )
        assert stats.binomtest(exceeded, trials, 1 - confidence).pvalue > 1e-3


def test_a_gaussian_fit_solves_for_the_centre_of_a_noncentral_t():
    rng = np.random.default_rng(4)
    inside, outside = rng.standard_normal(20) + 1.0, rng.standard_normal(25)
    bound = audit.gaussian_fit(inside, outside, delta=1e-3, confidence=0.9)
    t = stats.ttest_ind(inside, outside).statistic
    mus = np.linspace(0.0, 3.0, 30001)
    scale = math.sqrt(1 / 20 + 1 / 25)
    mu = mus[np.searchsorted(stats.nct.sf(t, 43, mus / scale), 0.1)]
    assert bound == pytest.approx(dpfunc.gaussian_epsilon(mu, 1e-3), abs=2e-3)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_bound_on_accuracy_fails_with_no_more_than_its_probability_exactly(p, confidence):
    """All sequences of ten runs that are right altogether or wrong altogether, with their weights."""
    failed = sum(
        p ** sum(runs) * (1 - p) ** (10 - sum(runs))
        for runs in product((0.0, 1.0), repeat=10)
        if audit.accuracy_bound(runs, confidence=confidence) > p
    )
    assert failed <= (1 - confidence) * (1 + 1e-9)


def test_a_bound_on_accuracy_is_tight_for_many_runs():
    rng = np.random.default_rng(5)
    bound = audit.accuracy_bound(rng.binomial(50, 0.6, 1000) / 50)
    assert 0.59 < bound < 0.6


@pytest.mark.parametrize("estimator", [audit.one_run, audit.one_run_curve])
def test_canaries_that_are_all_found_together_are_no_more_than_one_finding(estimator):
    """A run that shows every coin with probability 1/10 is (0, 1/10)-DP: its bound at 1/10 is 0."""
    options = {"family": audit.approximate_family(0.1)} if estimator is audit.one_run_curve else {}
    all_found = np.ones(500), np.zeros(500)
    assert estimator(*all_found, delta=0.1, num_guesses=1000, **options) == 0.0
    assert estimator(*all_found, delta=1e-9, num_guesses=1000) > 3.0


def test_one_run_curves_hold_for_gaussian_scores_and_come_near():
    rng = np.random.default_rng(6)
    truth = dpfunc.gaussian_epsilon(2.0, DELTA)
    bounds = [
        audit.one_run_curve(
            rng.standard_normal(500) + 2.0, rng.standard_normal(500), delta=DELTA, num_guesses=100
        )
        for _ in range(60)
    ]
    assert exceeds_no_more_than_stated(sum(bound > truth for bound in bounds), 60)
    assert np.median(bounds) > 0.4 * truth


@given(st.floats(0.05, 5.0))
def test_families_agree_on_what_they_share(mu):
    gaussian = audit.gaussian_family()
    log = (dpfunc.StepEvent(noise_multiplier=1.0, sampling_prob=1.0, sampling="none"),)
    noise = audit.noise_family(log)
    assert noise.advantage(mu) == pytest.approx(gaussian.advantage(mu), rel=1e-6)
    assert noise.epsilon(mu, DELTA) == pytest.approx(gaussian.epsilon(mu, DELTA), rel=1e-6)
    points = gaussian.points(mu)
    assert points.deltas[0] == pytest.approx(gaussian.advantage(mu), rel=1e-9)


def test_points_of_a_noise_family_are_on_or_above_the_profile():
    log = (dpfunc.StepEvent(noise_multiplier=1.0, sampling_prob=0.2, count=5),)
    epsilons, deltas = audit.noise_family(log).points(1.3)
    louder = (dpfunc.StepEvent(noise_multiplier=1.0 / 1.3, sampling_prob=0.2, count=5),)
    epsilons, deltas = epsilons[::5], deltas[::5]
    lower = [dpfunc.delta_bounds(louder, epsilon=float(e))[0] for e in epsilons]
    assert (deltas >= np.array(lower)).all()
    assert np.allclose(deltas, lower, rtol=1e-3)


def test_ties_are_broken_against_the_auditor():
    same = np.zeros(100)
    assert audit.one_run(same, same, delta=DELTA) == 0.0
    half = np.concatenate([np.ones(3), np.zeros(97)])
    assert audit.one_run(half, same, delta=DELTA, num_guesses=100) == 0.0


# Canaries.


def loss(params, example):
    x, y = example
    return torch.nn.functional.cross_entropy(params["w"] @ x + params["b"], y)


PARAMS = {"w": torch.zeros(4, 12), "b": torch.zeros(4)}
GENERATOR = torch.Generator().manual_seed(0)
DATA = (torch.randn(20, 12, generator=GENERATOR), torch.arange(20) % 4)


def test_a_marked_loss_is_the_users_at_scale_zero_and_a_sum_of_coordinates_above():
    wrapped = audit.marked_loss(loss)
    params = {"w": torch.randn(4, 12, generator=GENERATOR), "b": torch.ones(4)}
    example = (DATA[0][0], DATA[1][0])
    places = torch.tensor([1, 7, 30])
    plain = torch.func.grad(wrapped)(params, audit.Marked(example, places, torch.tensor(0.0)))
    users = torch.func.grad(loss)(params, example)
    assert all(plain[name].equal(users[name]) for name in params)
    canary = torch.func.grad(wrapped)(params, audit.Marked(example, places, torch.tensor(6.0)))
    joined = torch.cat([canary["b"], canary["w"].flatten()])  # tree order: by name
    expected = torch.zeros(52)
    expected[places] = 6.0 / math.sqrt(3)
    assert joined.allclose(expected)
    assert float(joined.norm()) == pytest.approx(6.0)


def test_quiet_coordinates_are_those_that_the_data_do_not_move():
    images = DATA[0].clone()
    images[:, 5] = 0.0  # the gradient of w[:, 5] is 0 for every example
    found = audit.quiet_coordinates(loss, PARAMS, (images, DATA[1]), random.key(0), num=4)
    assert sorted(found.tolist()) == [4 + 12 * row + 5 for row in range(4)]


def test_every_leaf_takes_one_coordinate_of_each():
    assert audit.every_leaf(PARAMS, num=5).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7], [0, 8]]


def test_mislabelled_and_blank_examples_are_what_they_say():
    inputs, labels = audit.mislabelled(DATA, random.key(0), num=20, num_classes=4)
    order = [int((DATA[0] == row).all(1).nonzero()) for row in inputs]
    assert sorted(order) == list(range(20))
    assert bool((labels != DATA[1][order]).all())
    assert set(labels.tolist()) == {0, 1, 2, 3}
    inputs, labels = audit.blank(DATA, num=4)
    assert inputs.shape == (4, 12)
    assert not inputs.any()
    assert labels.tolist() == [0, 1, 2, 3]


# The audit of a step.

MECHANISM = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=10)


def update(params, grads):
    return {name: params[name] - 0.5 * grads[name] for name in params}


def sound(loss):
    return dpfunc.make_dp_step(loss, MECHANISM, update)


def audited(make_step=sound, **options):
    settings = {
        "num_steps": 3,
        "delta": DELTA,
        "canaries": 24,
        "num_replicas": 150,
        "num_shadows": 50,
    }
    chosen = {**settings, **options}
    return dpfunc.audit_step(make_step, loss, PARAMS, DATA, MECHANISM, random.key(7), **chosen)


@pytest.fixture(scope="module")
def report():
    return audited()


def test_a_sound_step_is_consistent_and_its_bound_is_not_idle(report):
    log = (dpfunc.StepEvent(noise_multiplier=1.0, sampling_prob=0.5, count=3),)
    assert report.epsilon == dpfunc.epsilon(log, delta=DELTA)
    assert report.log == log
    assert 0.6 * report.epsilon < report.lower <= report.epsilon
    assert not report.refuted
    assert "is consistent with the accounted epsilon" in str(report)
    assert f"{report.lower:.3f}" in str(report)
    assert report.scores.shape == report.coins.shape == report.guesses.shape == (150, 24)


def test_bounds_of_sound_audits_exceed_no_more_often_than_stated():
    exceeded = 0
    for seed in range(12):
        report = dpfunc.audit_step(
            sound,
            loss,
            PARAMS,
            DATA,
            MECHANISM,
            random.key(seed),
            num_steps=1,
            delta=DELTA,
            confidence=0.8,
            canaries=24,
            num_replicas=40,
            num_shadows=20,
        )
        exceeded += report.refuted
    assert exceeds_no_more_than_stated(exceeded, 12, 0.8)


def halved(loss):
    step = dpfunc.make_dp_step(loss, replace(MECHANISM, noise_multiplier=0.5), update)
    return lambda params, batch, key: (step(params, batch, key)[0], MECHANISM.event())


def unclipped(loss):
    step = dpfunc.make_dp_step(
        loss, replace(MECHANISM, clipping=10.0, noise_multiplier=0.1), update
    )
    return lambda params, batch, key: (step(params, batch, key)[0], MECHANISM.event())


def same_noise(loss):
    step = sound(loss)
    return lambda params, batch, key: step(params, batch._replace(step=torch.tensor(0)), key)


@pytest.mark.parametrize(
    ("make_step", "options"),
    [
        (halved, {}),
        (unclipped, {}),
        (same_noise, {"num_steps": 6, "score": audit.spread_score}),
    ],
)
def test_a_broken_step_is_refuted(make_step, options):
    report = audited(make_step, **options)
    assert report.refuted
    assert "REFUTES" in str(report)


def test_a_sampler_that_takes_everyone_is_refuted():
    report = audited(draw=lambda num, key, step: torch.arange(num))
    assert report.refuted


def test_targeted_scores_do_not_refute_a_sound_step():
    for score in (audit.spread_score, audit.largest_score, audit.gradient_score):
        assert not audited(score=score, num_replicas=60).refuted


@pytest.mark.parametrize("estimator", ["one_run", "one_run_curve", "gaussian_fit"])
def test_estimators_by_name_are_consistent_on_a_sound_step(estimator):
    found = audited(estimator=estimator, num_replicas=60, num_steps=1)
    assert 0.0 < found.lower < found.epsilon
    assert audit.ESTIMATORS[estimator] in str(found)


def test_clopper_pearson_takes_one_canary():
    found = audited(estimator="clopper_pearson", canaries=1, num_replicas=250)
    assert 0.0 <= found.lower < found.epsilon
    with pytest.raises(ValueError, match="canaries=1 for 'clopper_pearson', got 24"):
        audited(estimator="clopper_pearson")


def test_the_same_key_gives_the_same_report_and_no_global_generator_is_used(report):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = audited()
    assert np.array_equal(again.scores, report.scores)
    assert again.lower == report.lower
    assert torch.get_rng_state().equal(before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def run(num_replicas=6, replicas_at_once=6, draw=None, step=None, num_steps=2):
    canaries = audit.gradient_canaries(DATA, torch.arange(5), scale=10.0)
    wrapped = audit.marked_loss(loss)
    draws = draw or (lambda num, key, t: dpfunc.poisson_indices(num, key, t, sampling_prob=0.5))
    return observe(
        step or sound(wrapped),
        loss,
        PARAMS,
        DATA,
        canaries,
        random.key(3),
        draw=draws,
        num_steps=num_steps,
        num_replicas=num_replicas,
        replicas_at_once=replicas_at_once,
    )


def test_how_many_runs_go_at_once_changes_rounding_alone():
    together, _ = run()
    for at_once in (1, 4):
        apart, _ = run(replicas_at_once=at_once)
        assert np.array_equal(together.coins, apart.coins)
        assert np.allclose(together.projections, apart.projections, atol=1e-6)


def test_a_canary_that_is_out_is_not_there_for_the_sampler():
    seen = []

    def draw(num, key, t):
        seen.append(num)
        return torch.arange(num)

    found, _ = run(draw=draw, num_steps=1)
    assert seen == [20 + int(row.sum()) for row in found.coins]


def test_batches_are_those_of_poisson_batches_under_the_key_that_the_step_gets():
    seen = []

    def step(params, batch, key):
        seen.append((batch, key))
        return params, MECHANISM.event()

    found, _ = run(step=step, replicas_at_once=1, num_replicas=3)
    for i, (batch, key) in enumerate(seen):
        coins = torch.from_numpy(found.coins[i // 2])
        own = torch.cat([DATA[0], DATA[0][:1].expand(5, 12)[coins]])
        expected = list(
            dpfunc.poisson_batches((own,), key, MECHANISM, num_steps=2, pad_to_multiple_of=1)
        )[i % 2]
        assert batch.data.data[0][batch.mask].equal(expected.data[0])
        assert int(batch.step) == i % 2


def test_projections_are_what_the_step_moved_along_the_canary():
    def step(params, batch, key):
        joined = batch.data.scale * batch.mask
        moved = torch.zeros(4).index_add(0, batch.data.coordinates[:, 0].clamp(max=3), joined)
        return {"w": params["w"], "b": params["b"] - moved}, MECHANISM.event()

    found, _ = run(step=step, draw=lambda num, key, t: torch.arange(num), num_steps=1)
    assert np.array_equal(found.projections[:, 0, :3], 10.0 * found.coins[:, :3])
    assert not found.projections[:, 0, 4].any()


def test_coins_are_fair_and_not_those_of_the_sampler():
    coins = run(num_replicas=400, replicas_at_once=400, num_steps=1)[0].coins
    assert stats.binomtest(int(coins.sum()), coins.size).pvalue > 1e-3
    assert len({row.tobytes() for row in coins}) > 25


def test_example_canaries_are_found_by_their_loss_where_little_noise_hides_them():
    quiet = replace(MECHANISM, noise_multiplier=0.05, sampling_prob=1.0)
    canaries = audit.example_canaries(audit.mislabelled(DATA, random.key(1), num=6, num_classes=4))
    found = dpfunc.audit_step(
        lambda loss: dpfunc.make_dp_step(loss, quiet, update),
        loss,
        PARAMS,
        DATA,
        quiet,
        random.key(2),
        num_steps=5,
        delta=DELTA,
        canaries=canaries,
        score=audit.loss_score,
        num_replicas=60,
    )
    assert (found.guesses == found.coins).mean() > 0.8
    assert 1.0 < found.lower < found.epsilon


def test_a_loss_that_takes_a_key_is_audited_too():
    def keyed(params, example, key):
        return loss(params, example) + 0.0 * random.uniform(key, ()).sum()

    canaries = audit.gradient_canaries(DATA, torch.arange(8), scale=10.0)
    found = dpfunc.audit_step(
        lambda loss: dpfunc.make_dp_step(loss, MECHANISM, update, has_key=True),
        keyed,
        PARAMS,
        DATA,
        MECHANISM,
        random.key(0),
        num_steps=1,
        delta=DELTA,
        canaries=canaries,
        num_replicas=20,
        num_shadows=20,
    )
    assert found.scores.shape == (20, 8)


def test_the_likelihood_ratio_beats_the_sum_where_a_canary_is_seldom_drawn():
    rng = np.random.default_rng(8)
    coins = rng.random((400, 30)) < 0.5
    drawn = coins[:, None] & (rng.random((400, 20, 30)) < 0.05)
    seen = audit.Observations(
        rng.standard_normal(drawn.shape) + 5.0 * drawn, np.zeros(coins.shape), coins
    )
    shadows, observed = seen.runs(0, 200), seen.runs(200, None)

    def area(score):
        found = score(shadows, observed)
        inside, outside = found[observed.coins], found[~observed.coins]
        return stats.mannwhitneyu(inside, outside).statistic / inside.size / outside.size

    assert area(audit.likelihood_ratio(0.05)) > area(audit.gradient_score) + 0.05


def test_the_likelihood_ratio_is_the_ratio_of_the_two_densities():
    rng = np.random.default_rng(9)
    prob, shift, std = 0.3, 2.0, 0.5
    coins = rng.random((4000, 5)) < 0.5
    drawn = coins[:, None] & (rng.random((4000, 3, 5)) < prob)
    seen = audit.Observations(
        1.0 + std * rng.standard_normal(drawn.shape) + shift * drawn, np.zeros(coins.shape), coins
    )
    out = stats.norm(1.0, std).logpdf(seen.projections)
    inside = stats.norm(1.0 + shift, std).logpdf(seen.projections)
    exact = np.logaddexp(np.log(1 - prob) + out, np.log(prob) + inside) - out
    found = audit.likelihood_ratio(prob)(seen, seen)
    assert np.quantile(np.abs(found - exact.sum(1)), 0.9) < 0.4
    assert np.abs(np.median(found - exact.sum(1))) < 0.05


def test_a_picture_is_drawn(report, tmp_path):
    audit.draw_audit(tmp_path / "audit.png", report)
    assert (tmp_path / "audit.png").stat().st_size > 10_000


def test_a_bar_shows_every_step_of_every_run(capsys):
    audited(num_replicas=4, num_shadows=4, progress=True)
    assert "24/24" in capsys.readouterr().err


# Edges.


@pytest.mark.parametrize(
    "estimator", [audit.clopper_pearson, audit.gaussian_fit, audit.one_run, audit.one_run_curve]
)
def test_bad_arguments_of_estimators_are_named(estimator):
    fine = [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="scores_in to be a vector of two or more"):
        estimator([], fine, delta=DELTA)
    with pytest.raises(ValueError, match="scores_out without NaN, got 1"):
        estimator(fine, [0.0, math.nan], delta=DELTA)
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="0 < delta < 1"):
            estimator(fine, fine, delta=delta)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="0 < confidence < 1"):
            estimator(fine, fine, delta=DELTA, confidence=confidence)


def test_bad_arguments_of_the_rest_are_named():
    with pytest.raises(ValueError, match="finite scores for a fit"):
        audit.gaussian_fit([0.0, math.inf], [0.0, 1.0], delta=DELTA)
    for bad in ([], [1.5], [math.nan], [[0.5]]):
        with pytest.raises(ValueError, match="accuracies to be a vector"):
            audit.accuracy_bound(bad)
    with pytest.raises(ValueError, match="correct <= num_guesses <= num_canaries"):
        audit.one_run_p_value(3, 2, 4, epsilon=1.0, delta=0.0)
    with pytest.raises(ValueError, match="num_guesses <= 4"):
        audit.one_run([0.0, 1.0], [0.0, 1.0], delta=DELTA, num_guesses=5)
    with pytest.raises(ValueError, match="scale to be positive"):
        audit.gradient_canaries(DATA, torch.arange(3), scale=0.0)
    with pytest.raises(ValueError, match="at least one canary"):
        audit.gradient_canaries(DATA, torch.zeros(0, 1, dtype=torch.int64), scale=1.0)
    with pytest.raises(TypeError, match="int64"):
        audit.gradient_canaries(DATA, torch.ones(3), scale=1.0)
    with pytest.raises(ValueError, match="sampling_prob above 0"):
        audit.likelihood_ratio(0.0)
    with pytest.raises(ValueError, match="number of parameters, got 99"):
        audit.quiet_coordinates(loss, PARAMS, DATA, random.key(0), num=99)
    with pytest.raises(ValueError, match="the number of rows, got 21"):
        audit.mislabelled(DATA, random.key(0), num=21, num_classes=4)


def test_bad_arguments_of_an_audit_are_named():
    with pytest.raises(TypeError, match="make_step to be a function of a loss, got int"):
        audited(3)
    with pytest.raises(TypeError, match=r"make_step\(loss\) to return a step, got NoneType"):
        audited(lambda loss: None)
    with pytest.raises(TypeError, match=r"return \(params, event\), got dict"):
        audited(lambda loss: lambda params, batch, key: params)
    with pytest.raises(TypeError, match="hold StepEvents, got 'event'"):
        audited(lambda loss: lambda params, batch, key: (params, "event"))
    few = {"num_replicas": 4, "num_shadows": 4}
    with pytest.raises(ValueError, match="scores without NaN"):
        audited(score=audit.loss_score, **few)
    with pytest.raises(ValueError, match=r"shape \(4, 24\) \(runs, canaries\), got \(2,\)"):
        audited(score=lambda shadows, observed: np.zeros(2), **few)
    with pytest.raises(ValueError, match="estimator to be one of 'independent_runs'"):
        audited(estimator="guess")
    for name in ("delta", "confidence"):
        with pytest.raises(ValueError, match=f"0 < {name} < 1"):
            audited(**{name: 1.0})


def test_relations_and_samplers_that_canaries_do_not_fit_are_refused():
    for change, message in (
        ({"relation": "replace_one"}, "canaries are in or out"),
        ({"sampling": "truncated_poisson"}, "draw= for sampling='truncated_poisson'"),
    ):
        with pytest.raises(ValueError, match=message):
            dpfunc.audit_step(
                sound,
                loss,
                PARAMS,
                DATA,
                replace(MECHANISM, **change),
                random.key(0),
                num_steps=1,
                canaries=4,
                delta=DELTA,
            )


def test_a_point_at_infinite_epsilon_says_nothing():
    points = audit.gaussian_family().points(1.0)
    more = audit.Points(np.append(points.epsilons, np.inf), np.append(points.deltas, 0.0))
    for right in (60, 70, 80, 90, 100):
        one, two = (
            audit.one_run_refutes(right, 100, 100, points=p, confidence=0.95)
            for p in (points, more)
        )
        assert one == two
