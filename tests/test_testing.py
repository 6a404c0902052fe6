"""Laws hold of this library on everything that the strategies draw; the strategies draw what they say."""

import inspect
import itertools
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dpfunc import (
    DPSGD,
    Batch,
    ClippingRule,
    L1Clipping,
    PerGroupClipping,
    Schedule,
    clip_and_sum,
    clipped_grad,
    epsilon,
    make_dp_step,
    make_train_step,
    optimizers,
    per_sample_grads,
    poisson_indices,
    private_grad,
    random,
    trees,
)
from dpfunc.accounting import ACCOUNTANTS
from dpfunc.noise import privatize
from dpfunc.testing import laws, strategies

KEY = random.key(31)
few = settings(max_examples=8)


def descend(params, grads):
    return trees.map(lambda p, g: p - 0.1 * g, params, grads)


class TestClipping:
    @given(strategies.rule_cases())
    def test_no_rule_lets_an_example_above_its_bound(self, case):
        laws.contribution_is_bounded(case.grads, case.rule, case.mask)
        laws.scales_keep_the_promise(case.grads, case.rule)
        laws.norms_are_upper_bounds(case.grads, case.rule)

    @given(strategies.rule_cases())
    def test_neighbours_are_within_the_sensitivity_of_any_rule(self, case):
        laws.neighbours_are_close(case.grads, case.rule)
        laws.replaced_neighbours_are_close(case.grads, case.rule)

    @given(strategies.rule_cases())
    def test_poison_and_padding_vanish_under_any_rule(self, case):
        laws.poison_vanishes(case.grads, case.rule)
        if case.mask is not None:
            laws.masked_rows_vanish(case.grads, case.rule, case.mask)

    @given(strategies.rule_cases(), st.integers(0, 6))
    def test_a_batch_is_a_bag_of_examples_to_any_rule(self, case, cut):
        laws.order_does_not_matter(case.grads, case.rule)
        laws.sums_add_up(case.grads, case.rule, cut)
        laws.duplicates_count_each(case.grads, case.rule)

    @given(strategies.rule_cases())
    def test_rules_that_only_shorten_are_idempotent(self, case):
        if isinstance(case.rule, L1Clipping):
            laws.clipping_is_idempotent(case.grads, case.rule)

    @given(strategies.rule_cases())
    def test_clipping_is_pure(self, case):
        laws.is_pure(clip_and_sum, case.grads, case.rule, mask=case.mask)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestLosses:
    @few
    @given(strategies.losses(), st.sampled_from([0.3, L1Clipping(l1_clip_norm=2.0)]))
    def test_methods_agree_and_keep_the_bound(self, case, clipping):
        for method in ("vmap", "bookkeeping", "two_pass"):
            laws.losses_contribution_is_bounded(*case, clipping, method=method)
        laws.examples_are_apart(*case)

    @few
    @given(strategies.losses(), st.sampled_from(["vmap", "bookkeeping", "two_pass"]))
    def test_chunks_and_padding_change_nothing_but_rounding(self, case, method):
        laws.chunks_and_padding_agree(*case, 0.3, method=method, rtol=1e-4)

    @few
    @given(strategies.losses())
    def test_methods_give_the_sum_of_a_float64_loop(self, case):
        laws.methods_agree(*case, 1e3, rtol=2e-3)

    @few
    @given(strategies.losses(st.integers(0, 3)))
    def test_gradients_are_pure(self, case):
        loss, params, data = case
        for f in (per_sample_grads(loss), clipped_grad(loss, 1.0)):
            laws.is_pure(f, params, data)


@st.composite
def steps(draw, **options):
    """A loss, its parameters, a batch of any mask, and a mechanism."""
    case = draw(strategies.losses())
    batch = draw(strategies.batches(case.data, st.integers(0, 7)))
    return case.loss, case.params, batch, draw(strategies.mechanisms(**options))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
class TestSteps:
    @few
    @given(steps())
    def test_a_release_is_the_mean_of_clipped_gradients_under_noise(self, case):
        loss, params, batch, mechanism = case
        gradient = private_grad(loss, mechanism)
        laws.release_is_the_mean(gradient, loss, params, batch, KEY, mechanism)
        laws.released_neighbours_are_close(gradient, params, batch, KEY, mechanism)

    @few
    @given(steps())
    def test_nothing_tells_an_empty_batch_but_its_noise(self, case):
        loss, params, batch, mechanism = case
        laws.empty_batch_is_noise(private_grad(loss, mechanism), params, batch, KEY)

    @few
    @given(steps(with_queries=True))
    def test_steps_are_pure_and_keep_no_graph(self, case):
        loss, params, batch, mechanism = case
        init, step = make_train_step(loss, mechanism, optimizers.sgd(0.1, momentum=0.9))
        laws.is_pure(step, init(params), batch, KEY)
        laws.keeps_no_graph(lambda p: step(init(p), batch, KEY), params)

    @given(strategies.mechanisms(with_queries=True), st.integers(0, 7))
    def test_all_queries_on_a_draw_are_one_event(self, mechanism, step):
        laws.queries_are_one_event(mechanism, step=step)

    @pytest.mark.parametrize("laplace", [False, True])
    @pytest.mark.parametrize("scheduled", [False, True])
    def test_the_event_tells_the_noise_which_is_fresh(self, laplace, scheduled):
        mechanism = DPSGD(
            clipping=L1Clipping(l1_clip_norm=0.5) if laplace else Schedule([2.0, 0.5]),
            noise_multiplier=Schedule([9.0, 3.0]) if scheduled else 3.0,
            sampling_prob=0.1,
            expected_batch_size=7,
            mechanism="laplace" if laplace else "gaussian",
        )
        gradient = private_grad(lambda p, x: (p["a"] * x).sum() + p["b"].sum(), mechanism)
        params = {"a": torch.ones(12_000), "b": torch.ones(8, 1000)}
        batch = Batch(torch.ones(2, 12_000), torch.ones(2) > 0, torch.tensor(1))
        laws.event_tells_the_noise(gradient, params, batch, KEY, mechanism)

    def test_noise_is_fresh_over_leaves_steps_keys_and_ranks(self):
        mechanism = DPSGD(
            clipping=1.0, noise_multiplier=1.0, sampling_prob=0.1, expected_batch_size=7
        )
        gradient = private_grad(lambda p, x: (p["a"] * x).sum() + p["b"].sum(), mechanism)
        params = {"a": torch.ones(2000), "b": torch.ones(10, 300), "c": torch.ones(2)}
        batch = Batch(torch.ones(2, 2000), torch.ones(2) > 0, torch.tensor(1))
        laws.noise_is_fresh(gradient, params, batch, KEY)

    def test_a_step_compiles_to_what_it_does(self, fresh_compiler):
        mechanism = DPSGD(
            clipping=Schedule([1.0, 2.0]),
            noise_multiplier=1.0,
            sampling_prob=0.1,
            expected_batch_size=7,
        )
        dp_step = make_dp_step(lambda p, x: (p["a"] @ x).square().sum(), mechanism, descend)
        batch = Batch(torch.eye(3), torch.ones(3) > 0, torch.tensor(1))
        laws.compiles_alike(dp_step, {"a": torch.ones(2, 3)}, batch, KEY)


class TestNoiseAndSampling:
    @settings(max_examples=5)
    @given(strategies.mechanisms(with_schedules=False), st.sampled_from(strategies.DTYPES[:2]))
    def test_noise_has_the_scale_and_the_law_of_any_mechanism(self, mechanism, dtype):
        laws.noise_is_calibrated(mechanism, key=KEY, dtype=dtype)
        laws.signal_is_kept({"w": torch.ones(5, dtype=dtype)}, mechanism, key=KEY)
        laws.is_pure(privatize, {"w": torch.zeros(5, dtype=dtype)}, KEY, mechanism)

    def test_noise_is_independent_for_both_laws(self):
        for rule, name in ((1.0, "gaussian"), (L1Clipping(l1_clip_norm=1.0), "laplace")):
            mechanism = DPSGD(
                clipping=rule,
                noise_multiplier=1.0,
                sampling_prob=0.1,
                expected_batch_size=7,
                mechanism=name,
            )
            laws.noise_is_independent(mechanism, key=KEY, num=4000)

    @settings(max_examples=5)
    @given(strategies.mechanisms())
    def test_batches_of_any_mechanism_are_whole(self, mechanism):
        laws.batches_are_whole(mechanism, num_steps=8)

    def test_sampling_is_pure(self):
        laws.is_pure(partial(poisson_indices, sampling_prob=0.3), 40, KEY, 7)


class TestAccountants:
    @few
    @pytest.mark.parametrize("accountant", ACCOUNTANTS)
    @given(strategies.logs(), strategies.logs(), strategies.deltas())
    def test_logs_compose(self, accountant, a, b, delta):
        by = partial(epsilon, accountant=accountant)
        laws.epsilon_is_a_number(a, delta, epsilon=by)
        laws.logs_compose(a, b, delta, epsilon=by)

    @few
    @pytest.mark.parametrize("accountant", ACCOUNTANTS)
    @given(strategies.events(), strategies.deltas(-10, -2), st.floats(1.0, 4.0))
    def test_epsilon_is_monotone_and_counts_fold(self, accountant, event, delta, factor):
        by = partial(epsilon, accountant=accountant)
        laws.epsilon_is_monotone(event, delta, factor, epsilon=by)
        laws.counts_fold((event,), 3, delta, epsilon=by)

    @few
    @given(strategies.logs(), strategies.logs())
    def test_renyi_divergences_add_up(self, a, b):
        laws.costs_add_up(a, b)

    @few
    @given(
        strategies.logs(strategies.events(min_noise=0.6, min_prob=1e-3)), strategies.deltas(-10, -2)
    )
    def test_bounds_bracket_and_claims_cover(self, log, delta):
        laws.bounds_bracket(log, delta)
        laws.epsilon_covers(log, delta)
        laws.epsilon_covers(log, delta, epsilon=partial(epsilon, accountant="rdp"))

    @few
    @given(strategies.events(min_noise=0.6, min_prob=1e-3), strategies.deltas(-10, -2))
    def test_relations_are_ordered(self, event, delta):
        laws.relations_are_ordered(
            event, delta, relations=("zero_out", "add_or_remove_one", "replace_one")
        )


@cache
def drawn(name, **options):
    """What a strategy draws, some hundred times."""
    found = []

    @settings(max_examples=250, derandomize=True, database=None, phases=[Phase.generate])
    @given(getattr(strategies, name)(**options))
    def collect(value):
        found.append(value)

    collect()
    return found


GRADIENTS = {
    "an empty batch": lambda leaf: len(leaf) == 0,
    "a batch of one": lambda leaf: len(leaf) == 1,
    "a scalar leaf": lambda leaf: leaf.ndim == 1,
    "an empty leaf": lambda leaf: len(leaf) > 0 and leaf[0].numel() == 0,
    "float16": lambda leaf: leaf.dtype == torch.float16,
    "float64": lambda leaf: leaf.dtype == torch.float64,
    "NaN": lambda leaf: leaf.isnan().any(),
    "infinity": lambda leaf: leaf.isinf().any(),
    "a zero row": lambda leaf: leaf.numel() > 0 and (leaf[0] == 0).all(),
    "huge numbers": lambda leaf: (leaf.abs() > 1e20).any(),
    "denormals": lambda leaf: ((leaf != 0) & (leaf.abs() < torch.finfo(leaf.dtype).tiny)).any(),
    "a row twice": lambda leaf: any(
        a.numel() and a.any() and a.isfinite().all() and a.equal(b)
        for a, b in itertools.pairwise(leaf)
    ),
}
MECHANISMS = {
    "laplace": lambda m: m.mechanism == "laplace",
    "replace_one": lambda m: m.relation == "replace_one",
    "a sum": lambda m: m.loss_reduction == "sum",
    "three queries": lambda m: len(m.telemetry) == 3,
    "adaptive clipping": lambda m: m.adaptive is not None,
    "scheduled clipping": lambda m: m.factor is not None,
    "scheduled noise": lambda m: isinstance(m.noise_multiplier, Schedule),
    "scheduled sampling": lambda m: isinstance(m.sampling_prob, Schedule),
    "full batches": lambda m: m.sampling == "none",
}


class TestStrategies:
    """Each kind comes, and what comes is what is said."""

    @pytest.mark.parametrize("kind", GRADIENTS)
    def test_gradients_of_each_kind_come(self, kind):
        assert any(
            GRADIENTS[kind](leaf)
            for grads in drawn("per_sample_grads")
            for leaf in trees.leaves(grads)
        )

    def test_trees_of_each_kind_come(self):
        found = {type(grads).__name__ for grads in drawn("per_sample_grads")}
        assert found >= {"dict", "list", "tuple", "Layer", "Tensor"}
        assert any(
            len({leaf.dtype for leaf in trees.leaves(grads)}) > 1
            for grads in drawn("per_sample_grads")
        )

    @pytest.mark.parametrize("kind", MECHANISMS)
    def test_mechanisms_of_each_kind_come(self, kind):
        assert any(map(MECHANISMS[kind], drawn("mechanisms", with_queries=True)))

    def test_rules_of_each_kind_come(self):
        rules = [case.rule for case in drawn("rule_cases")]
        assert len({type(rule) for rule in rules}) == 6
        groups = {len(rule.l2_clip_norms) for rule in rules if isinstance(rule, PerGroupClipping)}
        assert {1, 2} <= groups

    def test_losses_of_each_kind_come(self):
        assert len({case.loss.__qualname__ for case in drawn("losses")}) == 7

    @given(strategies.per_sample_grads(num_examples=st.integers(1, 3), poison=False), st.data())
    def test_rules_fit_their_tree(self, grads, data):
        rule = data.draw(strategies.clipping_rules(grads))
        assert isinstance(rule, ClippingRule)
        assert clip_and_sum(grads, rule).norms.shape == (trees.batch_size(grads, "grads"),)

    @given(st.data(), st.integers(0, 4))
    def test_batches_hold_the_data_where_the_mask_says_so(self, data, num):
        rows = torch.arange(num) + 1.0
        batch = data.draw(strategies.batches({"x": rows, "y": torch.arange(num)}))
        assert batch.data["x"][batch.mask].equal(rows[batch.mask])
        assert batch.step.ndim == 0

    @given(strategies.logs(strategies.events(relations=("replace_one",))), strategies.deltas())
    def test_logs_are_of_what_was_asked_for(self, log, delta):
        assert all(event.relation == "replace_one" for event in log)
        assert 0 < delta < 1


@pytest.mark.parametrize("order", [1, 2])
def test_exact_norms_at_the_edges(order):
    assert laws.exact_norm({}, order) == 0.0
    assert laws.exact_norm(torch.tensor([5e-324, 0.0], dtype=torch.float64), order) == 5e-324
    assert laws.exact_norm([torch.tensor([1.0, -math.inf])], order) == math.inf
    assert math.isnan(laws.exact_norm(torch.tensor([1.0, math.nan]), order))


@pytest.mark.parametrize(
    "asked",
    [
        lambda rng, rate: laws.numbers_follow(
            torch.from_numpy(rng.standard_normal(1000)), 1.0, error_rate=rate
        ),
        lambda rng, rate: laws.numbers_follow(
            torch.from_numpy(rng.laplace(size=1000)), 1.0, law="laplace", error_rate=rate
        ),
        lambda rng, rate: laws.streams_are_independent(
            {i: torch.from_numpy(rng.standard_normal(300)) for i in range(4)}, error_rate=rate
        ),
        lambda rng, rate: laws.inclusion_is_independent(
            _rows_of(rng.random((400, 8)) < 0.3),
            num_examples=8,
            num_steps=400,
            error_rate=rate,
        ),
    ],
    ids=["normal", "laplace", "streams", "inclusion"],
)
def test_a_law_refuses_what_is_right_no_more_often_than_it_says(asked):
    """Of 400 askings at a rate of 1/10, 65 or more are refused with probability below 1e-4."""
    refused = 0
    for seed in range(400):
        try:
            asked(np.random.default_rng(seed), 0.1)
        except AssertionError:
            refused += 1
    assert 0 < refused < 65


def _rows_of(member):
    return lambda step: np.flatnonzero(member[step])


SECTIONS = ("Args:", "Returns:", "Raises:", ">>>")
HELPERS = {"blank", "contribution", "drawn_by", "exact_norm"}


@pytest.mark.parametrize("name", laws.__all__)
def test_each_law_says_what_it_takes_what_it_raises_how_often_it_errs_and_how_it_is_used(name):
    law = getattr(laws, name)
    places = [law.__doc__.find(section) for section in SECTIONS]
    found = [place for place in places if place >= 0]
    assert found == sorted(found)
    assert "Args:" in law.__doc__
    assert ">>>" in law.__doc__
    assert ("AssertionError:" in law.__doc__) == (name not in HELPERS)
    takes = inspect.signature(law).parameters
    for parameter in takes:
        assert parameter in law.__doc__, f"{parameter} of {name} is not said"
    if "error_rate" in takes:
        assert "probability" in law.__doc__ or "error_rate: as for" in law.__doc__


@pytest.mark.parametrize("room", [laws, strategies])
def test_every_name_is_there_and_listed_in_order(room):
    assert room.__all__ == sorted(room.__all__) or room is strategies
    for name in room.__all__:
        assert name.isupper() or getattr(room, name).__doc__, name
