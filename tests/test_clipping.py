"""Clipping: the laws over random trees, formats and magnitudes, and the edges by hand."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dpfunc import FlatClipping, clip_and_sum, trees
from dpfunc.testing import laws, strategies


@given(strategies.clipping_cases())
def test_each_example_contributes_at_most_the_sensitivity(case):
    laws.contribution_is_bounded(case.grads, case.l2_clip_norm, case.mask)


@given(strategies.per_sample_grads(), strategies.clip_norms(-30, 30))
def test_the_bound_holds_at_extreme_clip_norms(grads, l2_clip_norm):
    laws.contribution_is_bounded(grads, min(max(l2_clip_norm, 1e-30), 1e30))


@given(strategies.clipping_cases())
def test_an_example_that_is_not_finite_contributes_exactly_zero(case):
    laws.poison_vanishes(case.grads, case.l2_clip_norm)


@given(strategies.clipping_cases())
def test_masked_rows_vanish_bit_for_bit(case):
    if case.mask is not None:
        laws.masked_rows_vanish(case.grads, case.l2_clip_norm, case.mask)


@given(strategies.clipping_cases())
def test_clip_of_clipped_is_clipped(case):
    laws.clipping_is_idempotent(case.grads, case.l2_clip_norm)


@given(strategies.clipping_cases())
def test_neighbours_differ_by_the_sensitivity_and_what_summation_rounds(case):
    laws.neighbours_are_close(case.grads, case.l2_clip_norm)
    laws.replaced_neighbours_are_close(case.grads, case.l2_clip_norm)


@given(strategies.clipping_cases(), st.integers(0, 5))
def test_the_sum_over_a_batch_is_the_sum_over_its_parts(case, cut):
    laws.sums_add_up(case.grads, case.l2_clip_norm, cut)


@given(strategies.clipping_cases())
def test_arguments_are_unchanged_and_the_same_call_gives_the_same_bits(case):
    laws.is_pure(clip_and_sum, case.grads, case.l2_clip_norm, mask=case.mask)


@given(
    st.integers(1, 300),
    strategies.clip_norms(-4, 4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_a_long_gradient_keeps_its_direction_and_comes_within_a_millionth_of_the_bound(n, c, dtype):
    generator = torch.Generator().manual_seed(n)
    g = torch.randn(1, n, generator=generator, dtype=dtype) * 1e3 * c + c
    if g.double().norm() <= c:
        return
    clipped = clip_and_sum(g, c).sum.double()
    assert c * (1 - 2e-6) <= clipped.norm() <= c
    cosine = (clipped @ g[0].double()) / clipped.norm() / g.double().norm()
    assert cosine > 1 - 1e-10


def test_a_gradient_within_the_bound_is_unchanged():
    g = torch.tensor([[0.3, -0.4], [0.0, 0.0]])
    assert clip_and_sum(g, 1.0).sum.equal(g[0])


def test_norms_are_over_all_leaves_together_and_zero_where_masked():
    grads = {"a": torch.tensor([[3.0], [5.0]]), "b": torch.tensor([4.0, 12.0])}
    clipped = clip_and_sum(grads, 1.0, mask=torch.tensor([True, False]))
    torch.testing.assert_close(clipped.norms, torch.tensor([5.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(clipped.sum["a"], torch.tensor([0.6]))
    torch.testing.assert_close(clipped.sum["b"], torch.tensor(0.8))


def test_an_empty_batch_gives_zeros():
    clipped = clip_and_sum({"w": torch.empty(0, 2, 3), "b": torch.empty(0)}, 1.0)
    assert clipped.sum["w"].equal(torch.zeros(2, 3))
    assert clipped.sum["b"].equal(torch.tensor(0.0))
    assert clipped.norms.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_formats_are_summed_in_float32(dtype):
    # 300 ** 2 overflows float16: in that format the norm would be infinite.
    clipped = clip_and_sum(torch.full((100, 4), 300.0, dtype=dtype), 1.0)
    assert clipped.sum.dtype == torch.float32
    torch.testing.assert_close(clipped.sum, torch.full((4,), 50.0), rtol=1e-5, atol=0)


def test_a_huge_finite_example_is_clipped_and_a_huge_float64_one_too():
    for g in (torch.full((1, 4), 1e30), torch.full((1, 4), 1e300, dtype=torch.float64)):
        clipped = clip_and_sum(g, 2.0)
        torch.testing.assert_close(clipped.sum, torch.ones_like(g[0]), rtol=1e-5, atol=0)


def test_a_scale_too_small_for_the_format_gives_zero_and_not_a_rounded_up_scale():
    g = torch.full((1, 1), 3e38)
    assert clip_and_sum(g, 1e-3).sum.item() == 0.0  # 3.3e-42 would be a denormal scale


def test_cancelling_and_tiny_entries_count():
    g = torch.full((1, 10**6), 1e-25)  # each square underflows float32
    assert laws.contribution_is_bounded(g, 1e-23) > 0.99


def test_scales_of_the_flat_rule():
    rule = FlatClipping(l2_clip_norm=2.0)
    assert (rule.sensitivity, rule.order) == (2.0, 2)
    a, b = rule.scales((torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0])))
    torch.testing.assert_close(a, torch.tensor([0.4, 1.0]))
    assert b.equal(a)


def test_a_rule_of_the_users_own():
    class Normalise:
        """Scale every gradient to norm 1, also upward."""

        sensitivity, order = 1.0, 2

        def scales(self, norms):
            total = trees.root_sum_squares(trees.leaves(norms))
            return trees.map(lambda _: torch.where(total > 0, 1 / total, 0.0), norms)

    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert 0.999999 < laws.contribution_is_bounded(g, Normalise()) <= 1


@given(strategies.clipping_cases(), st.sampled_from([1, 2]), st.floats())
def test_a_rule_that_breaks_its_promise_is_held_to_it(case, order, factor):
    class Broken:
        """Whatever factor comes, NaN and infinity included, for every norm."""

        sensitivity = case.l2_clip_norm

        def scales(self, norms):
            return trees.map(lambda norm: torch.full_like(norm, factor) / norm, norms)

    Broken.order = order
    laws.contribution_is_bounded(case.grads, Broken(), case.mask)


class Rule:
    """A rule made of a function of the total norm."""

    def __init__(self, scale, sensitivity=1.0, order=2):
        self.scale, self.sensitivity, self.order = scale, sensitivity, order

    def scales(self, norms):
        total = trees.root_sum_squares(trees.leaves(norms))
        return trees.map(lambda _: self.scale(total), norms)


def test_norms_are_in_the_order_of_the_rule():
    grads = (torch.tensor([[3.0, -1.0]]), torch.tensor([[4.0]]))
    clipped = clip_and_sum(grads, Rule(lambda t: 0 * t, order=1))
    torch.testing.assert_close(clipped.norms, torch.tensor([8.0], dtype=torch.float64))


def test_a_rule_never_sees_another_example():
    """Dividing all by the largest norm of the batch keeps every norm, and breaks the sensitivity."""
    by_largest = Rule(lambda total: 1 / total.max().clamp(min=1.0))
    g = torch.ones(100, 1)
    g[0] = 100.0
    laws.neighbours_are_close(g, by_largest)
    torch.testing.assert_close(clip_and_sum(g, by_largest).sum, torch.tensor([100.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_rule_that_scales_up_overflows_nothing(dtype):
    normalise = Rule(lambda total: 1e-30 / total, sensitivity=1e-30)
    for scale in (1.0, 1e-20, 1e-40, 1e-300, 5e-324):
        g = torch.full((2, 10), scale, dtype=torch.float64).to(dtype)
        laws.contribution_is_bounded(g, normalise)
        laws.contribution_is_bounded(g, Rule(lambda total: 1 / total))


@pytest.mark.parametrize(
    ("rule", "kind", "words"),
    [
        (Rule(lambda t: torch.ones(5)), ValueError, r"one 0-d scale .* got shape \(5,\) at scales"),
        (Rule(lambda t: 1.0), TypeError, "scales to be a tensor, got float"),
        (Rule(torch.ones_like, order=math.inf), ValueError, "order .* 1 or 2, got inf"),
        (Rule(torch.ones_like, order="2"), ValueError, "order"),
        (Rule(torch.ones_like, sensitivity=math.nan), ValueError, "sensitivity"),
        (Rule(torch.ones_like, sensitivity=-1.0), ValueError, "sensitivity"),
        ("flat", TypeError, "Or pass a clipping rule"),
    ],
)
def test_a_bad_rule_is_refused(rule, kind, words):
    with pytest.raises(kind, match=words):
        clip_and_sum({"w": torch.ones(1, 3)}, rule)


def test_the_law_on_scales_tells_a_rule_that_breaks_its_promise():
    g = torch.ones(2, 4)
    laws.scales_keep_the_promise(g, FlatClipping(l2_clip_norm=1.0))
    for scale in (lambda t: torch.ones_like(t), lambda t: -t, lambda t: t * math.nan):
        with pytest.raises(AssertionError, match="the scales"):
            laws.scales_keep_the_promise(g, Rule(scale))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-31, 1e31])
def test_bad_clip_norms_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="l2_clip_norm"):
        clip_and_sum(torch.ones(2, 2), bad)


@pytest.mark.parametrize("bad", ["1", None, True])
def test_clip_norms_that_are_no_numbers_are_refused(bad):
    with pytest.raises(TypeError, match="Expected l2_clip_norm to be a number"):
        clip_and_sum(torch.ones(2, 2), bad)


@pytest.mark.parametrize(
    ("grads", "mask", "kind", "words"),
    [
        ({"a": torch.ones(2, 1), "b": torch.ones(3, 1)}, None, ValueError, "same leading"),
        (
            {"a": torch.ones(2, 1), "b": torch.tensor(1.0)},
            None,
            ValueError,
            r"0-d tensor at grads\['b'\]",
        ),
        ({"a": torch.ones(2, 1, dtype=torch.int64)}, None, TypeError, r"int64 at grads\['a'\]"),
        ({"a": 1.0}, None, TypeError, r"got float at grads\['a'\]"),
        ({}, None, ValueError, "at least one tensor"),
        (torch.ones(2, 1), torch.ones(3, dtype=torch.bool), ValueError, r"mask of shape \(2,\)"),
        (torch.ones(2, 1), torch.ones(2), TypeError, "mask to be bool"),
        (torch.ones(2, 1), [True, True], TypeError, "mask to be a bool tensor"),
        ((torch.ones(2, 1), None), None, TypeError, r"NoneType at grads\[1\]"),
    ],
)
def test_bad_input_says_what_was_expected_and_where(grads, mask, kind, words):
    with pytest.raises(kind, match=words):
        clip_and_sum(grads, 1.0, mask=mask)


@pytest.mark.parametrize("seed", range(20))
def test_a_gradient_one_unit_above_the_bound_is_scaled(seed):
    """Rounding in the norm must not let a gradient pass whose true norm is above the bound."""
    g = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    square = sum((Fraction(x) ** 2 for x in g[0].tolist()), Fraction(0))
    c = math.sqrt(square)
    while Fraction(c) ** 2 >= square:
        c = math.nextafter(c, 0)
    clipped = clip_and_sum(g, c).sum
    assert sum((Fraction(x) ** 2 for x in clipped.tolist()), Fraction(0)) <= Fraction(c) ** 2
