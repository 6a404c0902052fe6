"""Schedules: what ran is what is logged, in one compiled graph."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dpfunc import (
    DPSGD,
    Batch,
    FlatClipping,
    Schedule,
    ScheduledClipping,
    StepEvent,
    append,
    clip_and_noise,
    epsilon,
    make_dp_step,
    make_train_step,
    optimizers,
    poisson_batches,
    private_grad,
    random,
    schedules,
    trees,
)

KEY = random.key(3)
NUM = 6
NOISE = schedules.exponential(2.0, decay=0.5, num_steps=NUM)
CLIP = schedules.staircase(4.0, decay=0.5, every=2, num_steps=NUM)
PROB = schedules.from_function(lambda t: 0.1 + 0.1 * t, num_steps=NUM)
PLAIN = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=8)


def loss(params, x):
    return (params["w"] * x).sum() ** 2 + (params["b"] * x).sum()


def case():
    g = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, generator=g), "b": torch.zeros(3)}
    return params, torch.randn(40, 3, generator=g)


def batch_of(data, step):
    return Batch(data, torch.ones(len(data), dtype=torch.bool), torch.tensor(step))


def descend(params, grads):
    return trees.map(lambda p, g: p - 0.1 * g, params, grads)


@given(st.integers(0, 30), st.floats(0.5, 2.0), st.floats(0.01, 10))
def test_the_formulas_of_the_three_kinds(step, decay, initial):
    assert schedules.exponential(initial, decay=decay, num_steps=31)(step) == initial * decay**step
    stairs = schedules.staircase(initial, decay=decay, every=3, num_steps=31)
    assert stairs(step) == initial * decay ** (step // 3)
    assert schedules.from_function(lambda t: t**2, num_steps=31)(step) == step**2


@pytest.mark.parametrize("step", [0, 1, 4, 5])
@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_a_scheduled_step_is_the_plain_step_with_the_numbers_of_that_step(step, method):
    params, data = case()
    mechanism = replace(PLAIN, clipping=CLIP, noise_multiplier=NOISE)
    plain = replace(PLAIN, clipping=CLIP(step), noise_multiplier=NOISE(step))
    batch = batch_of(data, step)
    got = private_grad(loss, mechanism, method=method)(params, batch, KEY)
    expected = private_grad(loss, plain, method=method)(params, batch, KEY)
    torch.testing.assert_close(got, expected)
    rule = ScheduledClipping(clipping=FlatClipping(l2_clip_norm=0.5), factor=CLIP)
    halved = private_grad(loss, replace(mechanism, clipping=rule), method=method)(
        params, batch, KEY
    )
    expected = private_grad(loss, replace(plain, clipping=CLIP(step) / 2), method=method)
    torch.testing.assert_close(halved, expected(params, batch, KEY))


def test_clip_and_noise_takes_the_numbers_of_its_step():
    grads = {"w": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}
    mechanism = replace(PLAIN, clipping=CLIP, noise_multiplier=NOISE)
    plain = replace(PLAIN, clipping=CLIP(3), noise_multiplier=NOISE(3))
    got = clip_and_noise(grads, KEY, mechanism, step=3)
    torch.testing.assert_close(got, clip_and_noise(grads, KEY, plain))
    with pytest.raises(ValueError, match="step= with a mechanism that has schedules"):
        clip_and_noise(grads, KEY, mechanism)


def test_the_log_holds_what_ran_and_the_accountant_sees_it():
    params, data = case()
    mechanism = replace(PLAIN, noise_multiplier=NOISE, sampling_prob=PROB)
    dp_step, log = make_dp_step(loss, mechanism, descend), ()
    for batch in poisson_batches(data, KEY, mechanism, num_steps=NUM):
        params, event = dp_step(params, batch, KEY)
        log = append(log, event.complete(step=batch.step))
    expected = [
        StepEvent(noise_multiplier=NOISE(t), sampling_prob=PROB(t), count=1) for t in range(NUM)
    ]
    assert list(log) == expected
    assert list(log) == [mechanism.event(torch.tensor(t)) for t in range(NUM)]
    assert epsilon(log, delta=1e-5) > epsilon(log[:-1], delta=1e-5)


def test_the_sampler_draws_with_the_probability_of_the_step():
    steep = schedules.from_function(lambda t: float(t >= 2), num_steps=4)
    batches = poisson_batches(
        torch.arange(50.0), KEY, replace(PLAIN, sampling_prob=steep), num_steps=4
    )
    assert [int(b.mask.sum()) for b in batches] == [0, 0, 50, 50]
    same = replace(PLAIN, sampling_prob=Schedule([0.3] * 4))
    plain = replace(PLAIN, sampling_prob=0.3)
    for a, b in zip(
        *(poisson_batches(torch.arange(50.0), KEY, m, num_steps=4) for m in (same, plain)),
        strict=True,
    ):
        assert a.data.equal(b.data)


def test_schedules_do_not_recompile(fresh_compiler):
    params, data = case()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    mechanism = replace(PLAIN, clipping=CLIP, noise_multiplier=NOISE, sampling_prob=PROB)
    init, step = make_train_step(loss, mechanism, optimizers.sgd(0.1))
    compiled = torch.compile(step, fullgraph=True, backend=counting)
    state = init(params)
    for t in range(NUM):
        expected, event = step(state, batch_of(data, t), KEY)
        state, same = compiled(state, batch_of(data, t), KEY)
        torch.testing.assert_close(state, expected)
        assert event.complete(step=t) == same.complete(step=t) == mechanism.event(t)
    assert len(graphs) == 1


@pytest.mark.parametrize("step", [-1, NUM, 10**6])
def test_a_step_without_a_number_releases_noise_without_end(step):
    params, data = case()
    noisy = private_grad(loss, replace(PLAIN, noise_multiplier=NOISE))(
        params, batch_of(data, step), KEY
    )
    assert not any(leaf.isfinite().any() for leaf in trees.leaves(noisy))
    unclipped = private_grad(loss, replace(PLAIN, clipping=CLIP, noise_multiplier=0.0))(
        params, batch_of(data, step), KEY
    )
    assert all(leaf.isnan().all() for leaf in trees.leaves(unclipped))


def test_schedules_are_values():
    assert Schedule([1, 2]) == Schedule((1.0, 2.0)) != Schedule([1, 3])
    assert len({Schedule([1, 2]), Schedule([1.0, 2.0])}) == 1
    mechanism = replace(PLAIN, noise_multiplier=NOISE, clipping=CLIP)
    same = schedules.exponential(2.0, decay=0.5, num_steps=NUM)
    assert mechanism == replace(mechanism, noise_multiplier=same)
    assert hash(mechanism) == hash(replace(mechanism))
    with pytest.raises(ValueError, match="read-only"):
        NOISE.values[0] = 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule([]), "a number for each step, got none"),
        (lambda: Schedule([1.0, math.nan]), r"values\[1\]"),
        (lambda: schedules.from_function(lambda t: math.nan, num_steps=2), "NaN at 0"),
        (lambda: schedules.exponential(1.0, decay=0.0, num_steps=2), "decay"),
        (lambda: schedules.exponential(1.0, decay=0.5, num_steps=0), "num_steps"),
        (lambda: schedules.staircase(1.0, decay=0.5, every=0, num_steps=2), "every"),
        (lambda: NOISE(NUM), "step < 6"),
        (lambda: NOISE(-1), "step >= 0"),
        (
            lambda: replace(PLAIN, sampling_prob=Schedule([0.5, 1.5])),
            "sampling_prob at step 1.*1.5",
        ),
        (lambda: replace(PLAIN, sampling_prob=Schedule([0.5, -0.1])), "sampling_prob at step 1"),
        (lambda: replace(PLAIN, noise_multiplier=Schedule([1, -1])), "noise_multiplier at step 1"),
        (
            lambda: replace(PLAIN, noise_multiplier=Schedule([1, math.inf])),
            "noise_multiplier at st",
        ),
        (lambda: replace(PLAIN, clipping=Schedule([1.0, 0.0])), "factor at step 1"),
        (lambda: replace(PLAIN, clipping=Schedule([1e20, 1e31])), "factor at step 1"),
        (lambda: replace(PLAIN, noise_multiplier=NOISE).event(), r"event\(step\) of a mechanism"),
        (lambda: replace(PLAIN, noise_multiplier=NOISE).event(NUM), "step < 6"),
        (
            lambda: poisson_batches(
                torch.ones(4), KEY, replace(PLAIN, clipping=CLIP), num_steps=NUM + 1
            ),
            "schedule of clipping to cover num_steps=7",
        ),
    ],
)
def test_bad_schedules_are_refused_before_anything_runs(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule(["a"]), "to be a number"),
        (lambda: NOISE(0.5), "whole number"),
        (lambda: ScheduledClipping(factor=2.0), "factor to be a Schedule"),
    ],
)
def test_what_is_no_schedule_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_an_event_is_completed_with_what_the_step_did_not_know():
    scheduled = make_dp_step(loss, replace(PLAIN, noise_multiplier=NOISE), descend)
    params, data = case()
    _, event = scheduled(params, batch_of(data, 1), KEY)
    with pytest.raises(TypeError, match="a step that did not"):
        event.complete(noise_multiplier=9.0, step=1)
    with pytest.raises(ValueError, match="no step"):
        event.complete()
    _, event = make_dp_step(loss, PLAIN, descend)(params, batch_of(data, 1), KEY, torch.tensor(0.1))
    with pytest.raises(TypeError, match="a step that did"):
        event.complete(step=0)


def test_a_tensor_beside_a_schedule_is_refused():
    params, data = case()
    f = private_grad(loss, replace(PLAIN, noise_multiplier=NOISE))
    with pytest.raises(TypeError, match="beside a schedule"):
        f(params, batch_of(data, 0), KEY, torch.tensor(1.0))
