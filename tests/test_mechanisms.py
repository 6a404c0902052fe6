"""Noise other than Gaussian, neighbouring relations, reductions, and the defects that must not be here."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from dpfunc import (
    DPSGD,
    Batch,
    L1Clipping,
    PerGroupClipping,
    Schedule,
    StepEvent,
    account_as,
    append,
    average_over_augmentations,
    clip_and_noise,
    clipped_grad,
    epsilon,
    epsilon_bounds,
    functional_loss,
    make_dp_step,
    overflow_probability,
    per_sample_grads,
    poisson_batches,
    private_grad,
    random,
    read_log,
    trees,
    write_log,
)
from dpfunc.testing import laws

KEY = random.key(21)
PLAIN = DPSGD(clipping=1.0, noise_multiplier=1.0, sampling_prob=0.5, expected_batch_size=4)
LAPLACE = replace(PLAIN, mechanism="laplace", clipping=L1Clipping(l1_clip_norm=1.0))


def two_sided(key, shape, *, dtype):
    """Noise of a user's own: an exponential size with a sign."""
    return random.laplace(key, shape, dtype=dtype)


CUSTOM = replace(PLAIN, mechanism="custom:two-sided", noise=two_sided)


class TestLaplace:
    def test_noise_is_laplace_of_the_scale_multiplier_times_sensitivity(self):
        mechanism = replace(LAPLACE, clipping=L1Clipping(l1_clip_norm=3.0), noise_multiplier=2.0)
        mechanism = replace(mechanism, loss_reduction="sum")
        drawn = clip_and_noise(torch.zeros(1, 20000), KEY, mechanism).double().numpy()
        assert stats.kstest(drawn, stats.laplace(scale=6.0).cdf).pvalue > 1e-3
        for wrong in (5.4, 6.6):
            assert stats.kstest(drawn, stats.laplace(scale=wrong).cdf).pvalue < 1e-3

    def test_the_event_is_accounted_as_what_it_is(self):
        event = replace(LAPLACE, sampling_prob=1.0, sampling="none").event()
        assert epsilon((event,), delta=1e-12) == pytest.approx(1.0, abs=1e-6)

    def test_l2_clipping_under_laplace_noise_is_refused_with_the_reason(self):
        for clipping in (1.0, PerGroupClipping(l2_clip_norms=1.0), Schedule([1.0])):
            with pytest.raises(ValueError, match=r"order 1.*sqrt\(d\)"):
                replace(LAPLACE, clipping=clipping)

    def test_an_l2_bound_does_not_have_the_epsilon_it_seems_to_have(self):
        """Two neighbours of L2 distance C whose log-likelihood ratio reaches sqrt(d) C / b, not C / b."""
        dim, scale, clip_norm = 100, 1.0, 1.0
        apart = torch.full((dim,), clip_norm / math.sqrt(dim))
        assert apart.norm().item() == pytest.approx(clip_norm)
        noise = random.laplace(KEY, (2000, dim), dtype=torch.float64) * scale
        ratio = ((noise + apart).abs() - noise.abs()).sum(1) / scale
        assert ratio.max() > 3 * clip_norm / scale
        at_zero = (apart.abs().sum() / scale).item()
        assert at_zero == pytest.approx(math.sqrt(dim) * clip_norm / scale)

    @pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
    def test_a_private_gradient_with_laplace_noise(self, method):
        def loss(w, x):
            return (w * x).sum()

        batch = Batch(torch.eye(3) * 5, torch.ones(3, dtype=torch.bool), torch.tensor(0))
        mechanism = replace(LAPLACE, noise_multiplier=0.0, loss_reduction="sum")
        grads = private_grad(loss, mechanism, method=method)(torch.zeros(3), batch, KEY)
        torch.testing.assert_close(grads, torch.ones(3))


class TestNoiseOfYourOwn:
    def test_it_is_drawn_from_the_key_of_its_leaf(self):
        grads = {"a": torch.zeros(1, 5), "b": torch.zeros(1, 5)}
        mechanism = replace(CUSTOM, loss_reduction="sum")
        noisy = clip_and_noise(grads, KEY, mechanism)
        assert not noisy["a"].equal(noisy["b"])
        laplace = clip_and_noise(grads, KEY, replace(LAPLACE, loss_reduction="sum"))
        assert all(noisy[n].equal(laplace[n]) for n in "ab")

    @pytest.mark.parametrize("accountant", ["pld", "rdp", "gdp"])
    @pytest.mark.parametrize("others", [0, 300])
    def test_every_accountant_refuses_its_event_until_told(self, accountant, others):
        log = append((), CUSTOM.event())
        for i in range(others):
            log = append(log, StepEvent(noise_multiplier=1.0 + i, sampling_prob=0.5))
        with pytest.raises(ValueError, match="custom:two-sided"):
            epsilon(log, delta=1e-5, accountant=accountant)

    def test_what_it_is_accounted_as_takes_its_place(self):
        log = append(append((), replace(CUSTOM).event()), PLAIN.event())
        told = account_as(log, "custom:two-sided", lambda e: (replace(e, mechanism="gaussian"),))
        assert list(told) == [replace(PLAIN.event(), count=2)]
        assert epsilon(told, delta=1e-5) > 0

    def test_what_it_is_accounted_as_may_be_several_events(self):
        told = account_as(
            (CUSTOM.event(),), CUSTOM.mechanism, lambda e: (PLAIN.event(), LAPLACE.event())
        )
        assert list(told) == [PLAIN.event(), LAPLACE.event()]

    def test_counts_and_the_relation_cannot_be_lost_on_the_way(self):
        log = (replace(CUSTOM.event(), count=1000),)
        told = account_as(log, CUSTOM.mechanism, lambda event: (PLAIN.event(),))
        assert list(told) == [replace(PLAIN.event(), count=1000)]
        for wrong in ((), (replace(PLAIN, relation="replace_one").event(),)):
            with pytest.raises(ValueError, match="'add_or_remove_one' and of a noise"):
                account_as(log, CUSTOM.mechanism, lambda event, wrong=wrong: wrong)

    def test_it_is_not_taken_to_be_accounted_by_itself(self):
        with pytest.raises(ValueError, match="for 'custom:two-sided'"):
            account_as((CUSTOM.event(),), CUSTOM.mechanism, lambda event: (event,))
        with pytest.raises(ValueError, match="custom:NAME"):
            account_as((PLAIN.event(),), "gaussian", lambda event: ())

    def test_its_event_is_written_and_read(self, tmp_path):
        write_log(tmp_path / "log.jsonl", (CUSTOM.event(),))
        assert list(read_log(tmp_path / "log.jsonl")) == [CUSTOM.event()]
        with pytest.raises(ValueError, match="custom:NAME"):
            StepEvent(noise_multiplier=1.0, sampling_prob=0.5, mechanism="custom:")

    def test_infinite_noise_of_unknown_shape_is_not_nothing(self):
        with pytest.raises(ValueError, match="noise_multiplier"):
            StepEvent(noise_multiplier=math.inf, sampling_prob=0.5, mechanism="custom:mine")

    @pytest.mark.parametrize(
        "fields",
        [
            {"mechanism": "custom:mine"},
            {"noise": two_sided},
            {"mechanism": "custom:mine", "noise": 1.0},
            {"mechanism": "laplace", "noise": two_sided, "clipping": L1Clipping(l1_clip_norm=1.0)},
        ],
    )
    def test_a_name_without_noise_or_noise_without_a_name_is_refused(self, fields):
        with pytest.raises(ValueError, match="noise= a function together with"):
            replace(PLAIN, **fields)

    def test_noise_of_another_shape_is_refused(self):
        mechanism = replace(CUSTOM, noise=lambda key, shape, dtype: torch.zeros(1))
        with pytest.raises(TypeError, match="return a tensor of shape"):
            clip_and_noise(torch.ones(2, 3), KEY, mechanism)


class TestReduction:
    def test_sum_divides_by_nothing_and_mean_by_the_public_number_alone(self):
        grads = torch.ones(7, 3)
        mean = clip_and_noise(grads, KEY, PLAIN)
        summed = clip_and_noise(grads, KEY, replace(PLAIN, loss_reduction="sum"))
        torch.testing.assert_close(summed, 4 * mean)
        more = clip_and_noise(torch.cat([grads, grads * 0]), KEY, PLAIN)
        torch.testing.assert_close(more, mean)

    def test_others_are_refused(self):
        with pytest.raises(ValueError, match="loss_reduction to be one of"):
            replace(PLAIN, loss_reduction="none")


class TestRelations:
    @pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "zero_out"])
    def test_the_relation_reaches_the_accountant_and_not_the_noise(self, relation):
        mechanism = replace(PLAIN, relation=relation)
        assert mechanism.event().relation == relation
        grads = torch.ones(2, 3)
        assert clip_and_noise(grads, KEY, mechanism).equal(clip_and_noise(grads, KEY, PLAIN))

    def test_replace_one_costs_less_than_a_doubled_sensitivity_where_batches_are_drawn(self):
        replaced = replace(PLAIN, sampling_prob=0.05, relation="replace_one")
        doubled = replace(PLAIN, sampling_prob=0.05, noise_multiplier=0.5)
        exact = epsilon((replace(replaced.event(), count=100),), delta=1e-5)
        loose = epsilon((replace(doubled.event(), count=100),), delta=1e-5)
        plain = epsilon((replace(PLAIN.event(), sampling_prob=0.05, count=100),), delta=1e-5)
        assert plain < exact < 0.7 * loose

    def test_without_sampling_it_is_the_doubled_sensitivity(self):
        full = replace(PLAIN, sampling="none", sampling_prob=1.0)
        replaced = replace(full, relation="replace_one").event()
        halved = replace(full, noise_multiplier=0.5).event()
        (low, high), (a, b) = (epsilon_bounds((e,), delta=1e-5) for e in (replaced, halved))
        assert low <= b
        assert a <= high

    def test_an_unknown_relation_is_refused(self):
        with pytest.raises(ValueError, match="relation to be one of"):
            replace(PLAIN, relation="neighbours")


class TestBatchAxes:
    def test_data_with_its_batch_axis_elsewhere(self):
        def loss(w, example):
            x, y = example
            return ((x @ w).sum() - y) ** 2

        g = torch.Generator().manual_seed(0)
        w, x, y = (torch.randn(*s, generator=g) for s in ((3,), (5, 4, 3), (5,)))
        expected = per_sample_grads(loss)(w, (x, y))
        got = per_sample_grads(loss, batch_axes=(1, 0))(w, (x.movedim(0, 1), y))
        torch.testing.assert_close(got, expected)
        for method in ("vmap", "bookkeeping"):
            whole = clipped_grad(loss, 1.0, method=method)(w, (x, y))
            moved = clipped_grad(loss, 1.0, method=method, batch_axes=(-2, 0), chunk_size=2)
            torch.testing.assert_close(moved(w, (x.movedim(0, 1), y)).sum, whole.sum)

    @pytest.mark.uses_global_generator  # nn's own initialisation
    def test_a_module_with_batch_first_false(self):
        attention = nn.MultiheadAttention(4, 2, batch_first=False)
        first = nn.MultiheadAttention(4, 2, batch_first=True)
        first.load_state_dict(attention.state_dict())

        def criterion(output, target):
            return (output[0].sum() - target.sum()) ** 2

        x, y = torch.linspace(-1, 1, 3 * 5 * 4).reshape(3, 5, 4), torch.ones(3)
        inputs = ((x, x, x), y)
        loss, params = functional_loss(attention, criterion, batch_axes=(1, 0))
        expected_loss, _ = functional_loss(first, criterion)
        got = per_sample_grads(loss)(params, inputs)
        torch.testing.assert_close(got, per_sample_grads(expected_loss)(params, inputs))

    @pytest.mark.parametrize(
        ("axes", "words"),
        [
            ((0,), "none for the leaf at '1'"),
            ((0, 2), "which has 2, got 2"),
            ((0, True), "whole number"),
            ((0, 0.5), "whole number"),
        ],
    )
    def test_axes_that_fit_no_leaf_are_told(self, axes, words):
        with pytest.raises(ValueError, match=words):
            per_sample_grads(lambda w, e: (w * e[0]).sum(), batch_axes=axes)(
                torch.ones(2), (torch.ones(3, 2), torch.ones(3, 2))
            )


class TestAugmentation:
    @staticmethod
    def loss(w, x):
        return torch.tanh(w @ x).square()

    @staticmethod
    def augment(x, key):
        return x + random.normal(key, x.shape)

    def test_the_copies_are_averaged_before_the_clip(self):
        averaged = average_over_augmentations(self.loss, self.augment, num=4)
        w, data = torch.ones(3), torch.linspace(-1, 1, 15).reshape(5, 3)
        grads = per_sample_grads(averaged, has_key=True)(w, data, key=KEY)
        keys = random.split(KEY, 5)
        for i in range(5):
            copies = [
                self.augment(data[i], k)
                for k in random.derive(keys[i], random.AUGMENTATION, range(4))
            ]
            expected = torch.stack([torch.func.grad(self.loss)(w, copy) for copy in copies]).mean(0)
            torch.testing.assert_close(grads[i], expected)
        one = clipped_grad(averaged, 1e-3, has_key=True)(w, data[:1], key=KEY).sum
        assert one.norm() <= 1e-3

    @pytest.mark.parametrize("method", ["bookkeeping", "two_pass"])
    def test_every_method_takes_it(self, method):
        averaged = average_over_augmentations(self.loss, self.augment, num=3)
        w, data = torch.ones(3), torch.linspace(-1, 1, 15).reshape(5, 3)
        expected = clipped_grad(averaged, 0.1, has_key=True, method="vmap")(w, data, key=KEY)
        got = clipped_grad(averaged, 0.1, has_key=True, method=method)(w, data, key=KEY)
        torch.testing.assert_close(got.sum, expected.sum, rtol=2e-4, atol=0)

    def test_a_loss_with_a_key_draws_anew_for_each_copy(self):
        seen = []

        def keyed(w, x, key):
            seen.append(key)
            return w @ x

        average_over_augmentations(keyed, self.augment, num=3, has_key=True)(
            torch.ones(3), torch.ones(3), KEY
        )
        assert len({tuple(key.tolist()) for key in seen}) == 3


class TestDefectsThatMustNotBeHere:
    """What Opacus 1.6 was seen to do, each by its name."""

    data = (torch.linspace(-1, 1, 60).reshape(20, 3), torch.arange(20) % 2)

    @staticmethod
    def loss(w, example):
        x, y = example
        return F.cross_entropy(x @ w, y)

    def test_one_nan_example_does_not_spoil_the_parameters(self):
        x = self.data[0].clone()
        x[3] = math.nan
        batch = Batch((x, self.data[1]), torch.ones(20, dtype=torch.bool), torch.tensor(0))
        for method in ("vmap", "bookkeeping", "two_pass"):
            noisy = private_grad(self.loss, PLAIN, method=method)(torch.zeros(3, 2), batch, KEY)
            assert noisy.isfinite().all()
        laws.poison_vanishes(per_sample_grads(self.loss)(torch.zeros(3, 2), (x, self.data[1])), 1.0)

    def test_empty_batches_are_neither_dropped_nor_uncounted(self):
        mechanism = replace(PLAIN, sampling_prob=0.02, expected_batch_size=1)
        dp_step = make_dp_step(self.loss, mechanism, lambda w, g: w - g)
        w, log, sizes = torch.zeros(3, 2), (), []
        for batch in poisson_batches(self.data, KEY, mechanism, num_steps=20):
            moved, event = dp_step(w, batch, KEY)
            assert not moved.equal(w)
            w, log = moved, append(log, event)
            sizes.append(int(batch.mask.sum()))
        assert 0 in sizes
        assert log[0].count == 20

    def test_the_divisor_is_declared_and_never_the_size_of_the_data(self):
        for num in (17, 20):
            data = trees.rows(self.data, 0, num)
            batch = Batch(data, torch.zeros(num, dtype=torch.bool), torch.tensor(0))
            noisy = private_grad(self.loss, PLAIN)(torch.zeros(3, 2), batch, KEY)
            expected = clip_and_noise(
                torch.zeros(0, 3, 2), random.derive(KEY, random.NOISE, 0), PLAIN
            )
            assert noisy.equal(expected)

    def test_the_number_of_releases_is_not_the_length_of_the_log(self):
        log = ()
        for _ in range(100):
            log = append(log, PLAIN.event())
        assert len(log) == 1
        assert log[0].count == 100

    def test_star_imports_work(self):
        exec("from dpfunc import *\nfrom dpfunc.optimizers import *", {})

    def test_noise_never_comes_from_the_global_generator(self):
        before = torch.get_rng_state()
        batch = Batch(self.data, torch.ones(20, dtype=torch.bool), torch.tensor(0))
        private_grad(self.loss, PLAIN)(torch.zeros(3, 2), batch, KEY)
        assert torch.get_rng_state().equal(before)

    def test_the_overflow_of_a_truncated_batch_is_accounted(self):
        bound = overflow_probability(20, sampling_prob=0.5, max_batch_size=15)
        cut = replace(PLAIN, sampling="truncated_poisson", overflow_prob=bound)
        assert epsilon((cut.event(),), delta=1e-1) > epsilon((PLAIN.event(),), delta=1e-1)
