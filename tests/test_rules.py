"""Clipping rules: each formula, its bound by every method, and the errors of parameter groups."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dpfunc import (
    DPSGD,
    AutomaticClipping,
    CustomClipping,
    FlatClipping,
    L1Clipping,
    PerGroupClipping,
    PerSampleAdaptiveClipping,
    clip_and_noise,
    clip_and_sum,
    clipped_grad,
    observe,
    per_sample_grads,
    random,
    trees,
)
from dpfunc.gradients import Rescaled
from dpfunc.testing import laws, strategies

KEY = random.key(5)


def soft(norms):
    total = trees.root_sum_squares(trees.leaves(norms))
    return trees.map(lambda _: 1 / (1 + total), norms)


RULES = {
    "flat": FlatClipping(l2_clip_norm=0.3),
    "l1": L1Clipping(l1_clip_norm=0.3),
    "auto-s": AutomaticClipping(l2_clip_norm=0.3),
    "auto-v": AutomaticClipping(l2_clip_norm=0.3, stabilizer=0.0),
    "psac": PerSampleAdaptiveClipping(l2_clip_norm=0.3, r=0.1),
    "per-group": PerGroupClipping(l2_clip_norms={"w": 0.3, "[vb]": 0.1}),
    "per-group noise": PerGroupClipping(l2_clip_norms={"w": 0.3, "[vb]": 0.1}, noise="per_group"),
    "custom": CustomClipping(scales=soft, sensitivity=1.0),
    "rescaled": Rescaled(rule=AutomaticClipping(), factor=torch.tensor(0.7, dtype=torch.float64)),
}
ANY_TREE = [name for name in RULES if not name.startswith("per-group")]
each_rule = pytest.mark.parametrize("name", RULES)


def loss(params, example):
    x, y = example
    out = torch.tanh(x @ params["w"]) @ params["v"] + params["b"]
    return (out - y).square().sum()


def case(num=6):
    g = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(5, 4, generator=g), "v": torch.randn(4, 3, generator=g)}
    params["b"] = torch.zeros(3)
    data = torch.randn(num, 5, generator=g), torch.randn(num, 3, generator=g)
    data[0][0] *= 1e-6
    data[0][1] *= 1e4
    return params, data


@pytest.mark.parametrize("name", ANY_TREE)
@given(strategies.clipping_cases())
def test_each_example_contributes_at_most_the_sensitivity(name, case):
    laws.contribution_is_bounded(case.grads, RULES[name], case.mask)


@pytest.mark.parametrize("name", ANY_TREE)
@given(strategies.per_sample_grads())
def test_scales_keep_the_promise_without_being_shrunk(name, grads):
    laws.scales_keep_the_promise(grads, RULES[name])


@pytest.mark.parametrize("name", ANY_TREE)
@given(strategies.clipping_cases())
def test_poison_and_padding_vanish(name, case):
    laws.poison_vanishes(case.grads, RULES[name])
    if case.mask is not None:
        laws.masked_rows_vanish(case.grads, RULES[name], case.mask)


@each_rule
def test_every_method_gives_the_sum_of_a_float64_loop(name):
    params, data = case()
    laws.methods_agree(loss, params, data, RULES[name])


@each_rule
@pytest.mark.parametrize("method", ["vmap", "bookkeeping", "two_pass"])
def test_no_example_is_above_the_bound_by_any_method(name, method):
    params, data = case()
    worst = laws.losses_contribution_is_bounded(loss, params, data, RULES[name], method=method)
    assert worst > 0.3


@each_rule
@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_masks_and_chunks_change_nothing_but_rounding(name, method):
    params, data = case()
    laws.chunks_and_padding_agree(
        loss, params, data, RULES[name], method=method, chunk_sizes=(1, 4), rtol=2e-6
    )


@each_rule
@pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
def test_every_rule_compiles_to_one_graph(name, method, fresh_compiler):
    params, data = case()
    f = clipped_grad(loss, RULES[name], method=method)
    laws.compiles_alike(f, params, data, rtol=1.3e-6, atol=1e-5)


@given(st.floats(-20, 20), st.floats(-6, 6), st.floats(-3, 1))
def test_the_formulas_of_automatic_clipping(log_norm, log_clip, log_stabilizer):
    norm, clip, stabilizer = 10.0**log_norm, 10.0**log_clip, 10.0**log_stabilizer
    at = torch.tensor(norm, dtype=torch.float64)
    auto_s = AutomaticClipping(l2_clip_norm=clip, stabilizer=stabilizer).scales([at])[0]
    auto_v = AutomaticClipping(l2_clip_norm=clip, stabilizer=0.0).scales([at])[0]
    psac = PerSampleAdaptiveClipping(l2_clip_norm=clip, r=stabilizer).scales([at])[0]
    assert auto_s.item() == pytest.approx(clip / (norm + stabilizer))
    assert auto_v.item() == pytest.approx(clip / norm)
    assert psac.item() == pytest.approx(clip / (norm + stabilizer / (norm + stabilizer)))
    most = clip if stabilizer >= 1 else clip / (2 * math.sqrt(stabilizer) - stabilizer)
    assert psac.item() <= most * (1 + 1e-12)


@pytest.mark.parametrize("name", ["auto-s", "auto-v", "psac"])
def test_a_gradient_of_zero_stays_zero_and_others_keep_their_direction(name):
    g = torch.tensor([[0.0, 0.0], [3e-5, 4e-5]])
    seen = observe(g, RULES[name])
    assert seen.after[0].equal(torch.zeros(2))
    torch.testing.assert_close(seen.after[1] / seen.after[1].norm(), torch.tensor([0.6, 0.8]))


class Largest(FlatClipping):
    """Divides by the largest norm of the batch, if it is shown one."""

    def scales(self, norms):
        return trees.map(lambda n: 1 / n.max().clamp(min=1.0), norms)


class Shares:
    """Any noise scales over flat clipping at 1."""

    sensitivity, order = 1.0, 2

    def __init__(self, widths):
        self.widths = widths

    def scales(self, norms):
        return FlatClipping(l2_clip_norm=1.0).scales(norms)

    def noise_scales(self, paths):
        return self.widths


class TestAgainstOverflow:
    """Where a product or a quotient of norms leaves float64 nothing is shown to be within the bound."""

    huge = torch.tensor([[1.2e308, 6e307]], dtype=torch.float64)

    @pytest.mark.parametrize("factor", [0.5, 1e-20, 1e-30, 1e20])
    @pytest.mark.parametrize("name", ["flat", "auto-s", "auto-v", "psac", "l1"])
    def test_a_factor_that_makes_norms_overflow(self, name, factor):
        rule = Rescaled(rule=RULES[name], factor=torch.tensor(factor, dtype=torch.float64))
        for scale in (1.0, 1e-100, 1e-290, 1e-305):
            laws.contribution_is_bounded(self.huge * scale, rule)

    @pytest.mark.parametrize("scales", [{"a": 1e300, "b": 1.0}, {"a": 1e300, "b": 1e300}])
    @pytest.mark.parametrize("sensitivity", [1.0, 1e-30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_scales_that_overflow(self, scales, sensitivity, dtype):
        rule = CustomClipping(
            scales=lambda norms: {n: torch.full_like(norms[n], scales[n]) for n in norms},
            sensitivity=sensitivity,
        )
        for a, b in ((1e9, 500.0), (1.0, 1.0), (1e-30, 1e30)):
            grads = {"a": torch.tensor([[a]], dtype=dtype), "b": torch.tensor([[b]], dtype=dtype)}
            laws.contribution_is_bounded(grads, rule)

    def test_shares_that_overflow(self):
        rule = Shares([1e-30, 1e-3])
        grads = [torch.full((1, 1), 1e300, dtype=torch.float64)] * 2
        assert clip_and_sum(grads, rule).sum[0].abs().item() <= 1e-30

    @pytest.mark.parametrize(
        "widths", [[-1e-6, 1.0], [0.0, 1e-6], [1.0], [math.nan, 1.0], [1e-300, 1.0]]
    )
    def test_noise_scales_that_are_none_are_refused(self, widths):
        mechanism = DPSGD(
            clipping=Shares(widths), noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=1
        )
        with pytest.raises(ValueError, match="noise_scales to be 2 numbers"):
            clip_and_noise([torch.ones(1, 1)] * 2, KEY, mechanism)


def test_a_subclass_of_a_rule_sees_one_example_too():
    g = torch.ones(100, 1)
    g[0] = 100.0
    laws.neighbours_are_close(g, Largest(l2_clip_norm=1.0))


def test_normalisation_of_what_is_hardly_there_overflows_nothing():
    for norm in (5e-324, 1e-310, 1e-300):
        g = torch.tensor([[norm]], dtype=torch.float64)
        laws.scales_keep_the_promise(g, RULES["auto-v"])
        laws.contribution_is_bounded(g, RULES["auto-v"])


def test_the_l1_rule_bounds_sums_of_absolute_values():
    grads = {"a": torch.tensor([[3.0, -1.0], [0.1, 0.0]]), "b": torch.tensor([4.0, -0.1])}
    seen = observe(grads, L1Clipping(l1_clip_norm=2.0))
    torch.testing.assert_close(seen.total_norms, torch.tensor([8.0, 0.2], dtype=torch.float64))
    torch.testing.assert_close(seen.after["a"], torch.tensor([[0.75, -0.25], [0.1, 0.0]]))


class TestGroups:
    """Thresholds as a prefix of the parameters, or as patterns on their paths."""

    nested = {  # noqa: RUF012
        "conv": {"weight": torch.ones(2, 3), "bias": torch.ones(2, 4)},
        "readout": [torch.ones(2, 9), torch.ones(2)],
    }

    def test_each_group_is_clipped_to_its_own_bound(self):
        rule = PerGroupClipping(l2_clip_norms={"conv": 0.5, "readout": [4.0, 0.25]})
        after = observe(self.nested, rule).after
        conv = torch.cat([after["conv"]["weight"], after["conv"]["bias"]], 1)
        torch.testing.assert_close(conv.norm(dim=1), torch.full((2,), 0.5))
        assert after["readout"][0].equal(self.nested["readout"][0])
        torch.testing.assert_close(after["readout"][1], torch.full((2,), 0.25))

    def test_dotted_names_are_the_same_as_nested_ones(self):
        flat = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.ones(2, 4)}
        rule = PerGroupClipping(l2_clip_norms={"conv": 0.5})
        nested = observe({"conv": self.nested["conv"]}, rule).after["conv"]
        assert observe(flat, rule).after["conv.weight"].equal(nested["weight"])

    def test_patterns_gather_leaves_from_everywhere(self):
        rule = PerGroupClipping(l2_clip_norms={"*.bias": 0.5, "*.weight": 1.0})
        flat = {f"{i}.{n}": torch.ones(1, 4) for i in range(3) for n in ("bias", "weight")}
        after = observe(flat, rule).after
        biases = torch.cat([after[f"{i}.bias"] for i in range(3)], 1)
        assert biases.norm().item() == pytest.approx(0.5)

    def test_the_sensitivity_is_the_root_of_the_sum_of_squares_and_never_below(self):
        from fractions import Fraction

        rule = PerGroupClipping(l2_clip_norms=[0.1, 0.7, 0.31])
        squares = sum(Fraction(c) ** 2 for c in (0.1, 0.7, 0.31))
        assert Fraction(rule.sensitivity) ** 2 >= squares
        assert rule.sensitivity == pytest.approx(math.sqrt(0.1**2 + 0.7**2 + 0.31**2), rel=1e-15)

    def test_one_bound_for_everything_is_flat_clipping(self):
        params, data = case()
        flat = clipped_grad(loss, 0.3)(params, data).sum
        grouped = clipped_grad(loss, PerGroupClipping(l2_clip_norms=0.3))(params, data).sum
        torch.testing.assert_close(grouped, flat)

    @given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
    def test_noise_per_group_costs_what_common_noise_costs(self, exponents):
        rule = PerGroupClipping(l2_clip_norms=[10.0**e for e in exponents], noise="per_group")
        scales = rule.noise_scales([str(i) for i in range(len(exponents))])
        shares = [10.0**e / scale for e, scale in zip(exponents, scales, strict=True)]
        assert math.fsum(share**2 for share in shares) <= 1.0
        assert math.fsum(share**2 for share in shares) == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("noise", "widths"), [("common", (5, 5)), ("per_group", (18**0.5, 32**0.5))]
    )
    def test_the_noise_of_each_group_has_its_own_scale(self, noise, widths):
        rule = PerGroupClipping(l2_clip_norms={"a": 3.0, "b": 4.0}, noise=noise)
        mechanism = DPSGD(
            clipping=rule, noise_multiplier=2.0, sampling_prob=0.5, expected_batch_size=1
        )
        grads = {"a": torch.zeros(1, 20000), "b": torch.zeros(1, 20000)}
        noisy = clip_and_noise(grads, KEY, mechanism)
        for name, width in zip("ab", widths, strict=True):
            # The variance of 20000 normals is off by 3 % one time in 3000.
            assert noisy[name].var().item() == pytest.approx((2 * width) ** 2, rel=0.035)

    def test_a_rule_whose_noise_scales_are_too_small_is_shrunk_to_them(self):
        class Half(FlatClipping):
            def noise_scales(self, paths):
                return [0.5 * self.sensitivity] * len(paths)

        summed = clip_and_sum(torch.full((1, 4), 10.0), Half(l2_clip_norm=1.0)).sum
        assert 0.4999 < summed.norm().item() <= 0.5

    @pytest.mark.parametrize(
        ("bounds", "words"),
        [
            ({"conv": 1.0}, r"'readout.0' in none of \['conv'\]"),
            ({"conv": 1.0, "readout": 1.0, "*bias": 1.0}, r"'conv.bias' in '\*bias' and 'conv'"),
            ({"conv": 1.0, "readout": 1.0, "head": 1.0}, "none in 'head'"),
            ({"conv": 1.0, "readout": [1.0, 1.0, 1.0]}, "none in 'readout.2'"),
        ],
    )
    def test_groups_that_match_nothing_or_twice_are_told(self, bounds, words):
        with pytest.raises(ValueError, match=words):
            clip_and_sum(self.nested, PerGroupClipping(l2_clip_norms=bounds))

    @pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e31])
    def test_bounds_that_are_no_bounds_are_told_by_their_path(self, bad):
        with pytest.raises(ValueError, match=r"l2_clip_norms\['a.1'\]"):
            PerGroupClipping(l2_clip_norms={"a": [1.0, bad]})

    def test_no_bounds_are_refused(self):
        with pytest.raises(ValueError, match="at least one bound"):
            PerGroupClipping(l2_clip_norms={})

    def test_a_rule_can_be_replaced_compared_and_hashed(self):
        rule = PerGroupClipping(l2_clip_norms={"a": [1.0, 2.0]})
        assert replace(rule, noise="per_group").l2_clip_norms == {"a.0": 1.0, "a.1": 2.0}
        assert rule == PerGroupClipping(l2_clip_norms={"a.0": 1.0, "a": {"1": 2.0}})
        assert hash(rule) == hash(replace(rule))


class TestObservation:
    def test_what_is_observed_is_what_is_summed(self):
        params, data = case()
        grads = per_sample_grads(loss)(params, data)
        mask = torch.arange(6) != 2
        seen = observe(grads, RULES["per-group"], mask=mask)
        clipped = clip_and_sum(grads, RULES["per-group"], mask=mask)
        torch.testing.assert_close(trees.map(lambda a: a.sum(0), seen.after), clipped.sum)
        assert seen.total_norms.equal(clipped.norms)
        assert seen.before is grads
        assert seen.sensitivity == RULES["per-group"].sensitivity
        assert all(scale[2] == 0 for scale in trees.leaves(seen.scales))
        w = grads["w"].flatten(1).double().norm(dim=1)
        torch.testing.assert_close(seen.norms["w"], w, rtol=1e-9, atol=0)

    def test_it_takes_an_empty_batch_and_poison(self):
        assert observe(torch.zeros(0, 3), 1.0).after.shape == (0, 3)
        seen = observe(torch.tensor([[math.nan, 1.0], [3.0, 4.0]]), 1.0)
        assert seen.after[0].equal(torch.zeros(2))
        assert seen.scales[0] == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutomaticClipping(stabilizer=-1.0), "stabilizer"),
        (lambda: AutomaticClipping(l2_clip_norm=0.0), "l2_clip_norm"),
        (lambda: PerSampleAdaptiveClipping(r=0.0), "r to be positive"),
        (lambda: L1Clipping(l1_clip_norm=math.nan), "l1_clip_norm"),
        (lambda: CustomClipping(scales=soft, sensitivity=math.inf), "sensitivity"),
        (lambda: CustomClipping(scales=soft, sensitivity=1.0, order=3), "order"),
        (lambda: PerGroupClipping(l2_clip_norms=1.0, noise="sometimes"), "noise to be one of"),
    ],
)
def test_numbers_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_scales_that_are_no_function_are_refused():
    with pytest.raises(TypeError, match="scales to be a function"):
        CustomClipping(scales=1.0, sensitivity=1.0)


@pytest.mark.parametrize("factor", [math.nan, 0.0, -1.0, math.inf])
def test_a_factor_that_is_no_positive_number_lets_nobody_count(factor):
    rule = Rescaled(rule=FlatClipping(l2_clip_norm=1.0), factor=torch.tensor(factor))
    assert clip_and_sum(torch.ones(2, 3), rule).sum.equal(torch.zeros(3))
