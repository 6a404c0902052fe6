"""Virtual batches: parts that add up to the step, and that are released once."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dpfunc import (
    DPSGD,
    AdaptiveClipping,
    Batch,
    MeanLoss,
    make_accumulator,
    make_train_step,
    optimizers,
    parts_of,
    private_grad,
    random,
    schedules,
    trees,
)

KEY = random.key(13)
MECHANISM = DPSGD(clipping=0.5, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=8)


def loss(params, x):
    return torch.tanh((params["w"] * x).sum()) + (params["b"] * x).sum() ** 2


def keyed_loss(params, x, key):
    return loss(params, x * random.uniform(key, x.shape))


def case(num=11):
    g = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, generator=g), "b": torch.randn(3, generator=g)}
    batch = Batch(torch.randn(num, 3, generator=g), torch.arange(num) % 4 != 1, torch.tensor(2))
    return params, batch


def released(accumulator, params, batch, num_rows, key=KEY, **start):
    init, accumulate, release = accumulator
    state = init(params, batch.step, **start)
    for part in parts_of(batch, num_rows):
        state = accumulate(state, params, part, key)
    return release(state, key)


@pytest.mark.parametrize("method", ["vmap", "bookkeeping", "two_pass"])
@pytest.mark.parametrize("num_rows", [1, 4, 11, 50])
def test_parts_release_what_the_whole_step_does(method, num_rows):
    params, batch = case()
    whole = private_grad(loss, MECHANISM, method=method)(params, batch, KEY)
    parts = released(make_accumulator(loss, MECHANISM, method=method), params, batch, num_rows)
    torch.testing.assert_close(parts, whole)
    if num_rows >= 11:
        assert all(parts[n].equal(whole[n]) for n in params)


@given(st.lists(st.integers(0, 11), max_size=4).map(sorted))
@settings(max_examples=20)
def test_parts_may_be_cut_anywhere_and_be_empty(cuts):
    params, batch = case()
    init, accumulate, release = make_accumulator(keyed_loss, MECHANISM, has_key=True)
    state = init(params, 2)
    for a, b in zip([0, *cuts], [*cuts, 11], strict=True):
        part = Batch(batch.data[a:b], batch.mask[a:b], batch.step)
        state = accumulate(state, params, part, KEY)
    whole = private_grad(keyed_loss, MECHANISM, has_key=True)(params, batch, KEY)
    torch.testing.assert_close(release(state, KEY), whole)


def test_no_parts_at_all_release_noise_alone():
    params, batch = case()
    init, _, release = make_accumulator(loss, MECHANISM)
    nobody = batch._replace(mask=torch.zeros(11, dtype=torch.bool))
    expected = private_grad(loss, MECHANISM)(params, nobody, KEY)
    got = release(init(params, 2), KEY)
    assert all(got[n].equal(expected[n]) for n in params)


def test_schedules_and_queries_go_along():
    params, batch = case()
    mechanism = replace(
        MECHANISM,
        clipping=AdaptiveClipping(initial=0.3, noise_multiplier=3.0),
        noise_multiplier=schedules.exponential(1.0, decay=0.9, num_steps=5),
        telemetry=(MeanLoss(high=2.0, noise_multiplier=4.0),),
    )
    init, step = make_train_step(loss, mechanism, optimizers.sgd(1.0))
    start = init(params)
    state, _ = step(start, batch, KEY)
    grads, states = released(
        make_accumulator(loss, mechanism), params, batch, 4, states=start.mechanism
    )
    torch.testing.assert_close(states, state.mechanism)
    torch.testing.assert_close(trees.map(torch.sub, params, grads), state.params)


class TestOnce:
    def test_a_second_release_is_refused(self):
        params, batch = case()
        init, accumulate, release = make_accumulator(loss, MECHANISM)
        state = accumulate(init(params, 2), params, batch, KEY)
        release(state, KEY)
        with pytest.raises(RuntimeError, match="same noise"):
            release(state, KEY)

    def test_neither_a_part_nor_a_release_may_follow_on_another_branch(self):
        params, batch = case()
        init, accumulate, release = make_accumulator(loss, MECHANISM)
        start = init(params, 2)
        one = accumulate(start, params, batch, KEY)
        two = accumulate(start, params, batch._replace(data=batch.data * 2), KEY)
        release(one, KEY)
        with pytest.raises(RuntimeError, match="that was not released"):
            release(two, KEY)
        with pytest.raises(RuntimeError, match="that was not released"):
            accumulate(one, params, batch, KEY)

    def test_other_parameters_are_refused_even_if_equal(self):
        params, batch = case()
        init, accumulate, _ = make_accumulator(loss, MECHANISM)
        state = accumulate(init(params, 2), params, batch, KEY)
        for other in (
            trees.map(torch.clone, params),
            {"w": params["w"]},
            {**params, "c": params["w"]},
        ):
            with pytest.raises(RuntimeError, match="the parameters that init got"):
                accumulate(state, other, batch, KEY)

    def test_parameters_that_were_written_to_are_refused(self):
        params, batch = case()
        init, accumulate, _ = make_accumulator(loss, MECHANISM)
        state = accumulate(init(params, 2), params, batch, KEY)
        params["w"].mul_(2.0)
        with pytest.raises(RuntimeError, match="written to since init"):
            accumulate(state, params, batch, KEY)

    def test_a_part_of_another_step_is_refused(self):
        params, batch = case()
        init, accumulate, _ = make_accumulator(loss, MECHANISM)
        with pytest.raises(ValueError, match="a part of step 3, got one of 2"):
            accumulate(init(params, 3), params, batch, KEY)

    def test_what_is_no_state_is_refused(self):
        _, accumulate, _ = make_accumulator(loss, MECHANISM)
        with pytest.raises(TypeError, match="what init made"):
            accumulate(None, *case(), KEY)


def test_the_sum_without_noise_shows_in_no_repr():
    params, batch = case()
    init, accumulate, _ = make_accumulator(loss, MECHANISM)
    assert (
        repr(accumulate(init(params, 2), params, batch, KEY))
        == "Accumulated(step=2, released=False)"
    )


def test_a_step_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="step >= 0"):
        make_accumulator(loss, MECHANISM).init(case()[0], -1)
