"""Telemetry and adaptive clipping: centred, bounded, noised, one event with the gradient."""

import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from dpfunc import (
    DPSGD,
    AdaptiveClipping,
    AutomaticClipping,
    Batch,
    ClipFraction,
    L1Clipping,
    MeanLoss,
    NormQuantile,
    Observed,
    PerGroupClipping,
    StepEvent,
    append,
    clip_and_noise,
    combined_noise_multiplier,
    delta,
    make_dp_step,
    make_train_step,
    noise_multiplier_beside,
    optimizers,
    poisson_batches,
    private_grad,
    random,
    trees,
)

KEY = random.key(8)
ADAPTIVE = AdaptiveClipping(quantile=0.5, initial=1.0, noise_multiplier=0.0)
QUIET = DPSGD(clipping=1.0, noise_multiplier=0.0, sampling_prob=0.5, expected_batch_size=4)


def loss(w, x):
    return w @ x


def batch_of(norms, mask=None, step=0):
    """Examples whose gradients have these norms."""
    data = torch.tensor(norms, dtype=torch.float32).reshape(-1, 1) * torch.tensor([0.6, 0.8])
    mask = torch.ones(len(norms), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Batch(data, mask, torch.tensor(step))


def stepped(mechanism, batch, state=None, **options):
    init, step = make_train_step(loss, mechanism, optimizers.sgd(1.0), **options)
    state = init(torch.zeros(2)) if state is None else state
    return step(state, batch, KEY)


class TestAdaptiveClipping:
    def test_the_update_is_that_of_andrew_et_al(self):
        mechanism = replace(QUIET, clipping=replace(ADAPTIVE, quantile=0.7, learning_rate=0.3))
        state, _ = stepped(mechanism, batch_of([0.5, 2.0, 3.0, 4.0]))
        clip_norm = state.mechanism["clip_norm"].item()
        assert clip_norm == pytest.approx(math.exp(-0.3 * (0.25 - 0.7)))

    def test_the_gradient_is_clipped_at_the_norm_before_the_update(self):
        mechanism = replace(
            QUIET, clipping=replace(ADAPTIVE, initial=2.0, quantile=0.7), loss_reduction="sum"
        )
        state, _ = stepped(mechanism, batch_of([0.5, 8.0]))
        torch.testing.assert_close(state.params, torch.tensor([-1.5, -2.0]))
        assert state.mechanism["clip_norm"] != 2.0

    def test_it_finds_the_quantile(self):
        norms = torch.linspace(0.1, 10.0, 100).tolist()
        adaptive = replace(ADAPTIVE, quantile=0.8, noise_multiplier=5.0)
        mechanism = replace(QUIET, clipping=adaptive, noise_multiplier=1.0, expected_batch_size=100)
        init, step = make_train_step(loss, mechanism, optimizers.sgd(0.1))
        state, seen = init(torch.zeros(2)), []
        for t in range(300):
            state, _ = step(state, batch_of(norms, step=t), KEY)
            seen.append(state.mechanism["clip_norm"].item())
        assert sum(seen[-100:]) / 100 == pytest.approx(8.0, rel=0.05)

    def test_noise_is_the_multiplier_times_the_clip_norm_of_the_step(self):
        wide = torch.zeros(4, 40000)
        adaptive = replace(ADAPTIVE, initial=5.0)
        mechanism = replace(QUIET, clipping=adaptive, noise_multiplier=2.0, loss_reduction="sum")
        init, step = make_train_step(loss, mechanism, optimizers.sgd(1.0))
        batch = Batch(wide, torch.ones(4, dtype=torch.bool), torch.tensor(0))
        state, _ = step(init(torch.zeros(40000)), batch, KEY)
        # The deviation of 40000 normals is off by 1.5 % one time in 50000.
        assert state.params.std().item() == pytest.approx(10.0, rel=0.015)

    @pytest.mark.parametrize("rows", [0, 3])
    def test_an_empty_batch_counts_one_half(self, rows):
        """Opacus' adaptive clipping fails on an empty batch, for it divides by the realised size."""
        batch = batch_of([1.0] * rows, [False] * rows)
        mechanism = replace(QUIET, clipping=replace(ADAPTIVE, quantile=0.5))
        state, _ = stepped(
            mechanism, Batch(batch.data.reshape(-1, 2), batch.mask.bool(), batch.step)
        )
        assert state.mechanism["clip_norm"].item() == 1.0

    def test_the_realised_batch_size_divides_nothing(self):
        twice = stepped(replace(QUIET, clipping=ADAPTIVE), batch_of([0.5] * 8))[0]
        once = stepped(
            replace(QUIET, clipping=ADAPTIVE, expected_batch_size=2), batch_of([0.5] * 4)
        )[0]
        assert twice.mechanism["clip_norm"].equal(once.mechanism["clip_norm"])

    def test_a_sum_of_losses_does_not_change_what_is_divided_here(self):
        batch, mean = batch_of([0.5, 2.0, 3.0]), replace(QUIET, clipping=ADAPTIVE)
        summed = replace(mean, loss_reduction="sum")
        assert stepped(summed, batch)[0].mechanism == stepped(mean, batch)[0].mechanism

    def test_the_clip_norm_stays_within_its_limits(self):
        adaptive = replace(ADAPTIVE, low=0.5, high=2.0, learning_rate=10.0)
        for norms, end in (([0.1] * 8, 0.5), ([9.0] * 8, 2.0)):
            state, _ = stepped(replace(QUIET, clipping=adaptive), batch_of(norms))
            assert state.mechanism["clip_norm"].item() == end

    @pytest.mark.parametrize("method", ["vmap", "bookkeeping"])
    def test_other_rules_are_scaled_alike(self, method):
        rule = PerGroupClipping(l2_clip_norms=1.0)
        mechanism = replace(QUIET, clipping=replace(ADAPTIVE, initial=3.0, clipping=rule))
        flat = replace(QUIET, clipping=replace(ADAPTIVE, initial=3.0))
        batch = batch_of([0.5, 8.0])
        a, _ = stepped(mechanism, batch, method=method)
        b, _ = stepped(flat, batch, method=method)
        torch.testing.assert_close(a, b)

    def test_it_compiles_to_one_graph(self, fresh_compiler):
        mechanism = replace(
            QUIET,
            noise_multiplier=1.0,
            clipping=replace(ADAPTIVE, noise_multiplier=3.0),
            telemetry=(
                MeanLoss(high=2.0, low=-2.0, noise_multiplier=2.0),
                ClipFraction(noise_multiplier=2.0),
            ),
        )
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return graph

        init, step = make_train_step(loss, mechanism, optimizers.sgd(0.1))
        compiled = torch.compile(step, fullgraph=True, backend=counting)
        state = init(torch.zeros(2))
        for t in range(3):
            expected, _ = step(state, batch_of([0.5, 2.0, 3.0], step=t), KEY)
            state, event = compiled(state, batch_of([0.5, 2.0, 3.0], step=t), KEY)
            torch.testing.assert_close(state, expected)
            assert event == mechanism.event()
        assert len(graphs) == 1


class TestOneEvent:
    """Two queries on one draw."""

    def test_count_and_gradient_are_one_event_with_the_combined_multiplier(self):
        adaptive = replace(ADAPTIVE, noise_multiplier=8.0)
        mechanism = replace(QUIET, noise_multiplier=1.0, clipping=adaptive)
        _, event = stepped(mechanism, batch_of([1.0]))
        assert event == StepEvent(
            noise_multiplier=combined_noise_multiplier(1.0, 8.0), sampling_prob=0.5
        )

    def test_two_events_would_under_report_many_times_over(self):
        """At small q, two draws hide an example better than one draw that is asked twice."""
        one = StepEvent(noise_multiplier=combined_noise_multiplier(1.0, 1.0), sampling_prob=1e-3)
        apart = StepEvent(noise_multiplier=1.0, sampling_prob=1e-3, count=2)
        assert delta((one,), epsilon=3.0) > 100 * delta((apart,), epsilon=3.0)

    @given(st.lists(st.floats(1.0, 100.0), max_size=4), st.floats(0.01, 0.4))
    def test_the_multiplier_beside_others_completes_them(self, others, combined):
        mine = noise_multiplier_beside(*others, combined=combined)
        together = combined_noise_multiplier(mine, *others)
        assert combined <= together <= combined * (1 + 1e-12)

    def test_queries_that_leave_no_room_are_refused(self):
        with pytest.raises(ValueError, match="leaves room within combined"):
            noise_multiplier_beside(2.0, combined=2.0)

    def test_a_tensor_of_noise_multipliers_is_completed_with_the_queries(self):
        mechanism = replace(QUIET, telemetry=(ClipFraction(noise_multiplier=2.0),))
        init, step = make_train_step(loss, mechanism, optimizers.sgd(1.0))
        _, partial = step(init(torch.zeros(2)), batch_of([1.0]), KEY, torch.tensor(1.5))
        event = partial.complete(noise_multiplier=1.5)
        assert event.noise_multiplier == combined_noise_multiplier(1.5, 2.0)
        assert append((), event)[0] == event

    @pytest.mark.parametrize(
        "fields",
        [
            {"mechanism": "laplace", "clipping": L1Clipping(l1_clip_norm=1.0)},
            {"mechanism": "custom:mine", "noise": random.normal},
        ],
    )
    def test_telemetry_beside_other_noise_is_refused(self, fields):
        with pytest.raises(ValueError, match="Expected Gaussian noise beside telemetry"):
            replace(QUIET, telemetry=(ClipFraction(noise_multiplier=2.0),), **fields)

    @pytest.mark.parametrize(
        "use",
        [
            lambda m: private_grad(loss, m),
            lambda m: make_dp_step(loss, m, None),
            lambda m: clip_and_noise(torch.ones(2, 2), KEY, m),
        ],
    )
    def test_what_keeps_no_state_refuses_queries(self, use):
        with pytest.raises(ValueError, match=r"clip_norm. Use make_train_step"):
            use(replace(QUIET, clipping=ADAPTIVE))


class TestTelemetry:
    telemetry = (
        MeanLoss(low=-1.0, high=3.0, noise_multiplier=0.0),
        ClipFraction(noise_multiplier=0.0),
        NormQuantile(quantile=0.5, initial=1.0, noise_multiplier=0.0),
    )

    def test_without_noise_it_is_what_it_says(self):
        mechanism = replace(QUIET, telemetry=self.telemetry)
        init, step = make_train_step(lambda w, x: w @ x + x.sum(), mechanism, optimizers.sgd(0.1))
        batch = batch_of([0.5, 2.0, 3.0, 0.1])
        state, _ = step(init(torch.zeros(2)), batch, KEY)
        losses = batch.data.sum(1).clamp(-1, 3)
        assert state.mechanism["mean_loss"].item() == pytest.approx(losses.mean().item())
        norms = batch.data.norm(dim=1)
        assert state.mechanism["clip_fraction"].item() == pytest.approx(
            (norms > 1).float().mean().item()
        )
        assert state.mechanism["norm_quantile"].item() == pytest.approx(
            math.exp(0.2 * (0.5 - (norms <= 1).float().mean().item()))
        )

    def test_nothing_is_reported_before_the_first_step(self):
        init, _ = make_train_step(loss, replace(QUIET, telemetry=self.telemetry), optimizers.sgd(1))
        states = init(torch.zeros(2)).mechanism
        assert states["mean_loss"].isnan()
        assert states["clip_fraction"].isnan()

    def test_the_gradient_is_what_it_is_without(self):
        batch = batch_of([0.5, 2.0, 3.0])
        noisy = replace(QUIET, noise_multiplier=1.0)
        with_it, _ = stepped(replace(noisy, telemetry=self.telemetry), batch)
        assert with_it.params.equal(stepped(noisy, batch)[0].params)

    def test_the_noise_of_a_query_has_its_standard_deviation_and_is_independent(self):
        queries = [ClipFraction(noise_multiplier=3.0, name=name) for name in "ab"]
        mechanism = replace(QUIET, noise_multiplier=1.0, telemetry=tuple(queries))
        init, step = make_train_step(loss, mechanism, optimizers.sgd(1.0))
        state, batch = init(torch.zeros(2)), batch_of([1.0], [False])
        keys = random.split(KEY, 4000)
        out = torch.vmap(lambda key: step(state, batch, key)[0].mechanism)(keys)
        a, b = (2 * out[name] - 1 for name in "ab")
        for drawn in (a, b):  # 4000 normals: the deviation is off by 4.5 % one time in 20000
            assert drawn.std().item() == pytest.approx(3.0 / 4, rel=0.045)
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.065

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e300])
    def test_one_example_moves_a_sum_by_at_most_one(self, poison):
        @dataclass(frozen=True)
        class Wild:
            name = "wild"
            noise_multiplier = 0.0
            needs_loss = False

            def init(self):
                return 0.0

            def value(self, observed, state):
                return torch.full_like(observed.norm, poison)

            def update(self, state, mean):
                return mean

        mechanism = replace(QUIET, telemetry=(Wild(),), expected_batch_size=1)
        state, _ = stepped(mechanism, batch_of([1.0]))
        assert abs(state.mechanism["wild"].item()) <= 1.0

    def test_poison_in_the_loss_counts_as_the_middle(self):
        query = MeanLoss(high=4.0, noise_multiplier=0.0)
        mechanism = replace(QUIET, telemetry=(query,), expected_batch_size=1)
        state, _ = stepped(mechanism, batch_of([math.nan]))
        assert state.mechanism["mean_loss"].item() == 2.0
        assert state.params.equal(torch.zeros(2))

    def test_a_query_sees_the_loss_only_where_one_asks(self):
        @dataclass(frozen=True)
        class Looks:
            needs_loss: bool
            name: str = "looks"
            noise_multiplier: float = 0.0

            def init(self):
                return 0.0

            def value(self, observed, state):
                assert isinstance(observed, Observed)
                return observed.loss.isnan().double()

            def update(self, state, mean):
                return mean

        for needs in (True, False):
            mechanism = replace(QUIET, telemetry=(Looks(needs),), expected_batch_size=2)
            state, _ = stepped(mechanism, batch_of([1.0, 2.0]))
            assert state.mechanism["looks"].item() == (not needs)

    def test_a_query_never_sees_another_example(self):
        """The share of examples below the batch's median would move by more than one's own value."""

        @dataclass(frozen=True)
        class Ranks:
            shape: tuple = ()
            name = "ranks"
            noise_multiplier = 1.0
            needs_loss = False

            def init(self):
                return 0.0

            def value(self, observed, state):
                below = (observed.norm >= observed.norm.reshape(-1)).double()
                return below.mean() if not self.shape else observed.norm.expand(self.shape)

            def update(self, state, mean):
                return mean

        one = replace(QUIET, telemetry=(Ranks(),), noise_multiplier=1.0)
        a, b = (stepped(one, batch_of(norms))[0] for norms in ([1.0, 2.0], [1.0, 900.0]))
        assert a.mechanism["ranks"].equal(b.mechanism["ranks"])
        with pytest.raises(TypeError, match="'ranks' to be a 0-d tensor"):
            stepped(replace(QUIET, telemetry=(Ranks((3,)),)), batch_of([1.0]))

    @pytest.mark.parametrize(
        ("telemetry", "kind", "words"),
        [
            (ClipFraction(noise_multiplier=1.0), TypeError, "tuple of queries"),
            ((1.0,), TypeError, "tuple of queries"),
            ((ADAPTIVE,), TypeError, "tuple of queries"),
            ((ClipFraction(noise_multiplier=1.0),) * 2, ValueError, "different names"),
            (
                (MeanLoss(high=1.0, noise_multiplier=1.0, name="clip_norm"),),
                ValueError,
                "different names",
            ),
        ],
    )
    def test_what_is_no_telemetry_is_refused(self, telemetry, kind, words):
        with pytest.raises(kind, match=words):
            replace(QUIET, clipping=ADAPTIVE, telemetry=telemetry)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: replace(ADAPTIVE, quantile=1.0), "quantile"),
        (lambda: replace(ADAPTIVE, learning_rate=0.0), "learning_rate"),
        (lambda: replace(ADAPTIVE, noise_multiplier=-1.0), "noise_multiplier"),
        (lambda: replace(ADAPTIVE, initial=1e9), "low <= initial <= high"),
        (lambda: replace(ADAPTIVE, clipping=2.0), "sensitivity 1"),
        (lambda: replace(ADAPTIVE, clipping=AutomaticClipping(l2_clip_norm=2.0)), "sensitivity 1"),
        (lambda: MeanLoss(low=1.0, high=1.0, noise_multiplier=1.0), "low < high"),
        (lambda: MeanLoss(high=math.inf, noise_multiplier=1.0), "both finite"),
        (lambda: ClipFraction(noise_multiplier=math.nan), "noise_multiplier"),
    ],
)
def test_numbers_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_whole_run_with_everything(fresh_compiler):
    g = torch.Generator().manual_seed(0)
    data = torch.randn(200, 2, generator=g)
    mechanism = DPSGD(
        clipping=AdaptiveClipping(initial=0.1, noise_multiplier=10.0),
        noise_multiplier=1.0,
        sampling_prob=0.2,
        expected_batch_size=40,
        telemetry=(MeanLoss(high=5.0, noise_multiplier=4.0),),
    )
    init, step = make_train_step(
        lambda w, x: (w - x).square().sum(), mechanism, optimizers.sgd(0.2)
    )
    state, log = init(torch.full((2,), 1.0)), ()
    for batch in poisson_batches(data, KEY, mechanism, num_steps=60):
        state, event = step(state, batch, KEY)
        log = append(log, event)
    assert state.params.norm() < 0.5
    assert state.mechanism["clip_norm"] > 0.5
    assert 0.5 < state.mechanism["mean_loss"] < 3.5
    assert log[0].count == 60
    assert int(state.step) == 60
    assert trees.leaves(state.mechanism)[0].dtype == torch.float64
