"""Poisson sampling: the inclusion law by chi-square, O(batch), addressable; padding and edges."""

import math
import time
from fractions import Fraction
from functools import partial

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpfunc import DPSGD, Batch, overflow_probability, poisson_batches, poisson_indices, random
from dpfunc.sampling.poisson import _binomial, uniform_subset
from dpfunc.testing import laws

KEY = random.key(2026)


def mechanism(**changes):
    fields = {
        "clipping": 1.0,
        "noise_multiplier": 1.0,
        "sampling_prob": 0.3,
        "expected_batch_size": 30,
    }
    return DPSGD(**{**fields, **changes})


@pytest.mark.parametrize(("num", "prob"), [(1, 0.3), (300, 0.02)])
def test_batch_sizes_are_binomial(num, prob):
    draws = 4000
    sizes = [len(poisson_indices(num, KEY, t, sampling_prob=prob)) for t in range(draws)]
    counts = np.bincount(sizes, minlength=num + 1)
    expected = draws * scipy.stats.binom.pmf(np.arange(num + 1), num, prob)
    common = expected >= 8
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], draws - expected[common].sum())
    keep = wanted > 1e-6
    assert (
        scipy.stats.chisquare(observed[keep], wanted[keep] * draws / wanted[keep].sum()).pvalue
        > 1e-3
    )


@pytest.mark.parametrize(
    ("num", "prob"), [(12, 0.1), (12, 0.5), (12, 0.7), (40, 0.2), (40, 0.5), (25, 0.8)]
)
def test_each_example_is_in_with_one_probability_independently_of_all_else(num, prob):
    laws.inclusion_is_independent(
        partial(poisson_indices, num, KEY, sampling_prob=prob),
        num_examples=num,
        sampling_prob=prob,
        num_steps=4000,
        error_rate=5e-3,
    )


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 10**6), st.integers())
def test_indices_are_sorted_distinct_in_range_and_a_function_of_key_and_step(num, prob, step, seed):
    key = random.key(seed)
    drawn = poisson_indices(num, key, step, sampling_prob=prob)
    assert drawn.dtype == torch.int64
    assert drawn.equal(torch.unique(drawn))
    assert not len(drawn) or (drawn[0] >= 0 and drawn[-1] < num)
    assert drawn.equal(poisson_indices(num, key, torch.tensor(step), sampling_prob=prob))


@given(st.integers(1, 200), st.data())
def test_a_subset_has_its_size_and_is_distinct(num, data):
    size = data.draw(st.integers(0, num))
    subset = uniform_subset(KEY, num, size)
    assert len(subset) == size == len(torch.unique(subset))


def test_the_count_follows_the_binomial_distribution_function_closely():
    """One count for each of many keys, in a case with a wide table."""
    counts = [_binomial(k, 10**6, 0.01) for k in random.split(KEY, 3000)]
    z = (np.array(counts) - 1e4) / math.sqrt(1e4 * 0.99)
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3


def test_two_billion_examples_take_milliseconds_and_memory_of_the_batch():
    poisson_indices(2 * 10**9, KEY, 0, sampling_prob=1e-7)
    begin = time.process_time()
    for t in range(20):
        drawn = poisson_indices(2 * 10**9, KEY, t, sampling_prob=1e-7)
        assert 100 < len(drawn) < 320
    assert time.process_time() - begin < 2.0  # a pass over the data would take a minute


def test_certain_and_impossible():
    assert poisson_indices(7, KEY, 0, sampling_prob=1.0).equal(torch.arange(7))
    assert len(poisson_indices(7, KEY, 0, sampling_prob=0.0)) == 0
    assert len(poisson_indices(0, KEY, 0, sampling_prob=0.5)) == 0
    assert len(poisson_indices(10, KEY, 0, sampling_prob=1e-300)) == 0


def test_batches_hold_the_drawn_examples_then_zeros():
    data = {"x": torch.arange(100.0)[:, None] + 1, "y": torch.arange(100)}
    for batch in poisson_batches(data, KEY, mechanism(), num_steps=5, pad_to_multiple_of=16):
        drawn = poisson_indices(100, KEY, batch.step, sampling_prob=0.3)
        assert len(batch.mask) % 16 == 0
        assert batch.mask.sum() == len(drawn)
        assert batch.data["y"][batch.mask].equal(drawn)
        assert batch.data["x"][batch.mask, 0].equal(drawn + 1.0)
        assert (batch.data["x"][~batch.mask] == 0).all()
        assert batch.step.dtype == torch.int64
        assert batch.step.ndim == 0


def test_every_step_has_its_batch_also_in_a_resumed_run():
    laws.batches_are_whole(mechanism(), key=KEY)
    laws.batches_are_whole(mechanism(sampling_prob=0.01, expected_batch_size=1), key=KEY)


def test_an_empty_draw_is_a_batch_of_padding_and_no_step_is_skipped():
    rare = mechanism(sampling_prob=0.01, expected_batch_size=1)
    batches = list(poisson_batches(torch.arange(20.0), KEY, rare, num_steps=40))
    assert [int(batch.step) for batch in batches] == list(range(40))
    assert any(not batch.mask.any() for batch in batches)
    assert all(len(batch.mask) > 0 for batch in batches)


class Rows(torch.utils.data.Dataset):
    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return {"x": torch.full((2,), float(i)), "y": i}


class Bulk(Rows):
    def __getitems__(self, indices):
        return [super(Bulk, self).__getitem__(i) for i in indices]


@pytest.mark.parametrize(
    "data", [Rows(60), Bulk(60), [{"x": np.full(2, float(i)), "y": i} for i in range(60)]]
)
def test_data_sets_of_rows_give_the_batches_of_columns(data):
    columns = {"x": torch.arange(60.0)[:, None].expand(60, 2), "y": torch.arange(60)}
    rare = mechanism(sampling_prob=0.03, expected_batch_size=2)
    pairs = zip(
        poisson_batches(data, KEY, rare, num_steps=30),
        poisson_batches(columns, KEY, rare, num_steps=30),
        strict=True,
    )
    empty = 0
    for a, b in pairs:
        empty += not a.mask.any()
        assert a.mask.equal(b.mask)
        torch.testing.assert_close(a.data, b.data, check_dtype=False)
    assert empty


def test_a_collate_function_of_the_users_own():
    def collate(rows):
        return torch.stack([row["x"].sum() for row in rows])

    batch = next(poisson_batches(Rows(60), KEY, mechanism(), num_steps=1, collate=collate))
    assert batch.data.shape == batch.mask.shape


def test_a_collate_function_that_makes_more_rows_than_examples_is_refused():
    def both_signs(rows):
        return torch.stack([sign * row["x"] for row in rows for sign in (1, -1)])

    def first(rows):
        return torch.stack([rows[0]["x"]])

    with pytest.raises(ValueError, match="one row for each example"):
        poisson_batches(Rows(60), KEY, mechanism(), num_steps=1, collate=both_signs)
    with pytest.raises(ValueError, match="one row for each example"):
        next(poisson_batches(Rows(60), KEY, mechanism(), num_steps=1, collate=first))


def test_a_collate_function_may_return_arrays_and_not_words():
    def arrays(rows):
        return {"y": np.array([row["y"] for row in rows])}

    batch = next(poisson_batches(Rows(60), KEY, mechanism(), num_steps=1, collate=arrays))
    assert batch.data["y"].dtype == torch.int64
    with pytest.raises(TypeError, match="tensors or numeric arrays, got a str"):
        poisson_batches(Rows(60), KEY, mechanism(), num_steps=1, collate=lambda rows: ["a"])


def test_the_mask_is_where_the_data_is():
    batch = next(poisson_batches(torch.zeros(60, 2, device="meta"), KEY, mechanism(), num_steps=1))
    assert batch.mask.device.type == "meta"
    assert batch.step.device.type == "cpu"


def test_a_cap_keeps_a_uniform_subset_and_only_in_a_mechanism_that_says_so():
    capped = mechanism(sampling="truncated_poisson")
    batches = poisson_batches(torch.arange(100), KEY, capped, num_steps=300, max_batch_size=25)
    kept = np.zeros(100)
    for batch in batches:
        drawn = poisson_indices(100, KEY, batch.step, sampling_prob=0.3)
        values = batch.data[batch.mask]
        assert len(values) == min(25, len(drawn))
        assert torch.isin(values, drawn).all()
        kept[values.numpy()] += 1
    assert scipy.stats.chisquare(kept).pvalue > 1e-3
    assert capped.event().sampling == "truncated_poisson"
    for wrong, cap in ((mechanism(), 25), (capped, None)):
        with pytest.raises(ValueError, match="truncated_poisson"):
            poisson_batches(torch.arange(100), KEY, wrong, num_steps=1, max_batch_size=cap)


def exact_tail(num, prob, cap):
    """Pr[Binomial(num, prob) > cap] with 40 digits, summed from the side that converges."""
    with mpmath.workdps(40):
        p, q = mpmath.mpf(prob), 1 - mpmath.mpf(prob)
        up = cap + 1 > num * p
        at = cap + 1 if up else cap
        log = mpmath.loggamma(num + 1) - mpmath.loggamma(at + 1) - mpmath.loggamma(num - at + 1)
        term = mpmath.exp(log + at * mpmath.log(p) + (num - at) * mpmath.log(q))
        total = mpmath.mpf(0)
        while term > total * mpmath.mpf(10) ** -30:
            total += term
            term *= (num - at) * p / ((at + 1) * q) if up else at * q / ((num - at + 1) * p)
            at += 1 if up else -1
        return total if up else 1 - total


@pytest.mark.parametrize(
    ("num", "prob"),
    [(2, 0.5), (10, 1e-9), (50, 0.3), (300, 0.97), (1488, 0.6066), (60_000, 0.01), (10**7, 0.9)]
    + [(10**9, 1e-6), (2**40, 1e-9), (2**40, 1e-4)],
)
def test_the_overflow_is_the_tail_rounded_up_a_little(num, prob):
    deviation = math.sqrt(num * prob * (1 - prob))
    for away in (-13, -8, -3, -0.5, 0, 1, 4, 8, 11.5, 13, 20, 36):
        cap = min(max(1, int(num * prob + away * deviation)), num - 1)
        found = overflow_probability(num, sampling_prob=prob, max_batch_size=cap)
        true = exact_tail(num, prob, cap)
        assert true <= found <= 1.0
        assert found <= true * (1 + mpmath.mpf(2e-8)) + mpmath.mpf(2e-30)


@given(st.integers(1, 60), st.floats(0, 1), st.integers(1, 60))
def test_the_overflow_is_never_below_the_sum_of_the_law(num, prob, cap):
    found = overflow_probability(num, sampling_prob=prob, max_batch_size=cap)
    p = Fraction(prob)
    true = sum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(cap + 1, num + 1))
    assert true <= Fraction(found)
    assert found <= float(true) * (1 + 2e-8) + 2e-30
    fewer = overflow_probability(num - 1, sampling_prob=prob, max_batch_size=cap)
    p_fewer = sum(
        math.comb(num - 1, k) * p**k * (1 - p) ** (num - 1 - k) for k in range(cap + 1, num)
    )
    assert p_fewer <= Fraction(fewer)
    assert p_fewer <= Fraction(found), "the bound for more examples serves fewer"


def test_the_overflow_at_its_edges():
    assert overflow_probability(0, sampling_prob=0.5, max_batch_size=1) == 1e-30
    assert overflow_probability(100, sampling_prob=0.5, max_batch_size=100) == 1e-30
    assert overflow_probability(100, sampling_prob=0.0, max_batch_size=1) == 1e-30
    assert overflow_probability(100, sampling_prob=1.0, max_batch_size=99) == 1.0
    assert overflow_probability(2**40, sampling_prob=0.5, max_batch_size=1) == 1.0
    # Deep in the tail scipy says 0, where the truth is 1e-270.
    assert overflow_probability(1488, sampling_prob=0.6066, max_batch_size=1420) == 1e-30


@pytest.mark.parametrize(
    "changes",
    [{"num_examples": -1}, {"num_examples": 2**40 + 1}, {"num_examples": 1.5}]
    + [{"sampling_prob": -0.1}, {"sampling_prob": 1.1}, {"sampling_prob": math.nan}]
    + [{"max_batch_size": 0}, {"max_batch_size": 2.5}, {"max_batch_size": None}],
    ids=str,
)
def test_a_bad_number_is_refused_by_its_name(changes):
    fields = {"num_examples": 100, "sampling_prob": 0.1, "max_batch_size": 20, **changes}
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        overflow_probability(**fields)


def test_a_mechanism_says_how_often_it_cuts():
    bound = overflow_probability(100, sampling_prob=0.3, max_batch_size=50)
    capped = mechanism(sampling="truncated_poisson", overflow_prob=np.float64(bound))
    assert type(capped.overflow_prob) is float
    assert capped.event().overflow_prob == capped.overflow_prob == bound
    assert mechanism().event().overflow_prob == 0.0
    batch = next(poisson_batches(torch.ones(100), KEY, capped, num_steps=1, max_batch_size=50))
    silent = mechanism(sampling="truncated_poisson")
    same = next(poisson_batches(torch.ones(100), KEY, silent, num_steps=1, max_batch_size=50))
    assert torch.equal(batch.mask, same.mask)
    for sampling, prob in (("poisson", 0.1), ("truncated_poisson", 1.5), ("truncated_poisson", -1)):
        with pytest.raises(ValueError, match="overflow_prob"):
            mechanism(sampling=sampling, overflow_prob=prob)
    with pytest.raises(TypeError, match="overflow_prob"):
        mechanism(sampling="truncated_poisson", overflow_prob=None)


def test_a_run_sees_few_padded_sizes():
    wide = mechanism(sampling_prob=0.01, expected_batch_size=256)
    sizes = {
        len(batch.mask) for batch in poisson_batches(torch.zeros(25_600), KEY, wide, num_steps=300)
    }
    assert len(sizes) <= 4


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: poisson_indices(10, KEY, 0, sampling_prob=1.2),
            ValueError,
            "0 <= sampling_prob <= 1, got 1.2",
        ),
        (lambda: poisson_indices(10, KEY, 0, sampling_prob=math.nan), ValueError, "sampling_prob"),
        (lambda: poisson_indices(10, 5, 0, sampling_prob=0.1), ValueError, "key to be an integer"),
        (
            lambda: poisson_batches(torch.zeros(3), 0, mechanism(), num_steps=1),
            ValueError,
            "key to be an integer tensor",
        ),
        (
            lambda: poisson_batches(torch.zeros(3), KEY, 1.0, num_steps=1),
            TypeError,
            "mechanism to be a dpfunc.DPSGD, got float",
        ),
        (
            lambda: poisson_batches(torch.zeros(3), KEY, mechanism(), num_steps=2, start=3),
            ValueError,
            "start <= num_steps=2",
        ),
        (
            lambda: poisson_batches((torch.zeros(3), None), KEY, mechanism(), num_steps=1),
            TypeError,
            r"NoneType at data\[1\]",
        ),
        (
            lambda: poisson_batches(
                torch.utils.data.DataLoader(Rows(3)), KEY, mechanism(), num_steps=1
            ),
            TypeError,
            "of a DataLoader, pass its dataset",
        ),
        (lambda: poisson_indices(-1, KEY, 0, sampling_prob=0.1), ValueError, "num_examples >= 0"),
        (lambda: poisson_indices(2**41, KEY, 0, sampling_prob=0.1), ValueError, "num_examples"),
        (lambda: poisson_indices(10, KEY, -1, sampling_prob=0.1), ValueError, "step >= 0"),
        (
            lambda: poisson_batches(torch.zeros(3), KEY, mechanism(), num_steps=-1),
            ValueError,
            "num_steps",
        ),
        (
            lambda: poisson_batches(torch.zeros(3), KEY, mechanism(), num_steps=1, start=-1),
            ValueError,
            "start",
        ),
        (
            lambda: poisson_batches(Rows(0), KEY, mechanism(), num_steps=1),
            ValueError,
            "at least one example",
        ),
        (
            lambda: poisson_batches(iter([]), KEY, mechanism(), num_steps=1),
            TypeError,
            "iterable stream",
        ),
        (
            lambda: poisson_batches([torch.zeros(3)] * 3, KEY, mechanism(), num_steps=1),
            TypeError,
            "either",
        ),
        (
            lambda: poisson_batches(
                (torch.zeros(3), torch.zeros(2)), KEY, mechanism(), num_steps=1
            ),
            ValueError,
            "same leading",
        ),
    ],
)
def test_bad_input_is_refused_at_the_call(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_batch_is_a_named_tuple():
    assert Batch._fields == ("data", "mask", "step")
