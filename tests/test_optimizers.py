"""Optimizers against torch.optim and their papers over fifty steps; laws that all of them keep."""

import math

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, StepLR

from dpfunc import DPSGD, Batch, clip_and_noise, make_train_step, random
from dpfunc.noise import released_variance
from dpfunc.optimizers import (
    adam,
    adam_bc,
    adamw,
    apply_updates,
    averaged,
    chain,
    constant,
    cosine_decay,
    disk,
    disk_params,
    ema,
    exponential_decay,
    sgd,
    step_decay,
)
from dpfunc.testing.strategies import per_sample_grads

MECHANISM = DPSGD(clipping=2.0, noise_multiplier=3.0, sampling_prob=0.1, expected_batch_size=4)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = {
    "sgd": (sgd(0.1), lambda p: SGD(p, lr=0.1)),
    "momentum": (sgd(0.1, momentum=0.9), lambda p: SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": (
        sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    "decayed sgd": (sgd(0.1, weight_decay=0.3), lambda p: SGD(p, lr=0.1, weight_decay=0.3)),
    "decayed nesterov": (
        sgd(0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
        lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
    ),
    "adam": (adam(0.05), lambda p: ADAM(p, lr=0.05)),
    "adam of other numbers": (
        adam(0.05, b1=0.5, b2=0.9, stabilizer=1e-3),
        lambda p: ADAM(p, lr=0.05, betas=(0.5, 0.9), eps=1e-3),
    ),
    "adamw": (adamw(0.05), lambda p: ADAMW(p, lr=0.05)),
    "decayed adamw": (adamw(0.05, weight_decay=0.5), lambda p: ADAMW(p, lr=0.05, weight_decay=0.5)),
}
SCHEDULES = {
    "constant": (constant(0.05), lambda o: LambdaLR(o, lambda t: 1.0)),
    "exponential": (exponential_decay(0.05, decay=0.93), lambda o: ExponentialLR(o, 0.93)),
    "stepped": (step_decay(0.05, decay=0.3, every=7), lambda o: StepLR(o, 7, gamma=0.3)),
    "cosine": (
        cosine_decay(0.05, num_steps=50, final=0.01),
        lambda o: CosineAnnealingLR(o, 50, eta_min=0.01),
    ),
    "warm": (
        cosine_decay(0.05, num_steps=40, num_warmup_steps=8),
        lambda o: LambdaLR(
            o,
            lambda t: (t + 1) / 8 if t < 8 else (1 + math.cos(math.pi * min(1, (t - 8) / 32))) / 2,
        ),
    ),
    "lambda": (lambda t: 0.05 / (1 + t.double()), lambda o: LambdaLR(o, lambda t: 1 / (1 + t))),
}
ALL = {
    **{name: ours for name, (ours, _) in CASES.items()},
    "scheduled": sgd(cosine_decay(0.1, num_steps=5, num_warmup_steps=2), momentum=0.9),
    "adam_bc": adam_bc(0.05, MECHANISM, weight_decay=0.1),
    "ema": ema(decay=0.7),
    "biased ema": ema(decay=0.7, unbiased=False),
    "chain": chain(ema(decay=0.7), adamw(0.05)),
    "averaged": averaged(sgd(0.1, momentum=0.9), decay=0.8),
    "disk": disk(adamw(0.05), gain=0.3),
}
every_optimizer = pytest.mark.parametrize("optimizer", ALL.values(), ids=ALL)


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(4, 3, generator=generator), "b": torch.zeros(())}
    return generator, {name: p.to(dtype) for name, p in params.items()}


def draw(generator, params):
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for n, p in params.items()
    }


def compiled_of(update):
    return torch.compile(update, fullgraph=True, backend="aot_eager")


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def run_beside_torch(ours, theirs, scheduler=None, compiled=False):
    generator, params = start()
    reference = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = theirs(reference.values())
    rates = scheduler(optimizer) if scheduler else None
    state, update = ours.init(params), compiled_of(ours.update) if compiled else ours.update
    for _ in range(50):
        grads = draw(generator, params)
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
        for name, p in reference.items():
            p.grad = grads[name].clone()
        optimizer.step()
        if rates:
            rates.step()
        for name, p in reference.items():
            torch.testing.assert_close(params[name], p.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_equal_torch_optim(ours, theirs, compiled, fresh_compiler):
    run_beside_torch(ours, theirs, compiled=compiled)


@pytest.mark.parametrize(("schedule", "scheduler"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("make", "theirs"),
    [
        (lambda s: sgd(s, momentum=0.9), lambda p: SGD(p, lr=0.05, momentum=0.9)),
        (lambda s: adamw(s, weight_decay=0.3), lambda p: ADAMW(p, lr=0.05, weight_decay=0.3)),
    ],
    ids=["sgd", "adamw"],
)
def test_schedules_equal_those_of_torch(schedule, scheduler, make, theirs):
    run_beside_torch(make(schedule), theirs, scheduler)


def test_schedules_are_float64_whatever_the_integer_and_never_begin_at_zero():
    for name, (schedule, _) in SCHEDULES.items():
        assert schedule(torch.tensor(0)) > 0, name
    for schedule in (constant(0.1), step_decay(0.1, decay=0.5, every=3)):
        assert schedule(torch.tensor(0, dtype=torch.int32)).dtype == torch.float64
    assert cosine_decay(0.1, num_steps=9, final=0.05)(torch.tensor(10**9)) == 0.05


@every_optimizer
def test_one_graph_serves_every_step_and_equals_eager(optimizer, fresh_compiler):
    generator, params = start(torch.float32)
    eager = state = optimizer.init(params)
    update = compiled_of(optimizer.update)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(8):
            grads = draw(generator, params)
            updates, state = update(grads, state, params)
            expected, eager = optimizer.update(grads, eager, params)
            torch.testing.assert_close(updates, expected, rtol=1e-6, atol=1e-7)
            params = apply_updates(params, updates)


def test_a_learning_rate_that_is_a_number_in_the_graph_would_have_been_seen(fresh_compiler):
    """The test of the test: a Python number that changes makes a second graph."""
    update = compiled_of(lambda grads, rate: -rate * grads)
    update(torch.ones(2), 0.1)
    refused = torch._dynamo.exc.RecompileError
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(refused):
        update(torch.ones(2), 0.05)


@every_optimizer
@settings(max_examples=15)
@given(trees=per_sample_grads(st.just(2), poison=False))
def test_updates_are_pure_on_any_tree(optimizer, trees):
    """One row of a drawn tree for parameters and one for a gradient: any nesting, shape and format."""
    params, grads = (optree.tree_map(lambda leaf, i=i: leaf[i], trees) for i in range(2))
    _, state = optimizer.update(grads, optimizer.init(params), params)  # a state past the first
    arguments = (grads, state, params)
    before = [leaf.clone() for leaf in leaves(arguments)]
    once, twice = optimizer.update(*arguments), optimizer.update(*arguments)
    assert_same_bits(leaves(arguments), before)
    assert_same_bits(leaves(once), leaves(twice))
    assert optree.tree_structure(once[0]) == optree.tree_structure(params)
    assert optree.tree_structure(once[1]) == optree.tree_structure(state)
    for update, p in zip(leaves(once[0]), leaves(params), strict=True):
        assert update.shape == p.shape
        assert update.dtype == torch.promote_types(p.dtype, torch.float32)


def assert_same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@every_optimizer
def test_vmap_over_replicas_equals_a_loop(optimizer):
    generator, params = start(torch.float32)
    replicas = [draw(generator, params) for _ in range(3)]
    steps = [[draw(generator, params) for _ in replicas] for _ in range(3)]
    stack = lambda trees: torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *trees)  # noqa: E731
    together = stack(replicas)
    state = torch.vmap(optimizer.init)(together)
    states = [optimizer.init(p) for p in replicas]
    for grads in steps:
        updates, state = torch.vmap(optimizer.update)(stack(grads), state, together)
        together = apply_updates(together, updates)
        for i, grad in enumerate(grads):
            moved, states[i] = optimizer.update(grad, states[i], replicas[i])
            replicas[i] = apply_updates(replicas[i], moved)
    torch.testing.assert_close(together, stack(replicas), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(leaves(state), leaves(stack(states)), rtol=1e-6, atol=1e-7)


@every_optimizer
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    + [(torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_state_and_updates_are_float32_at_least_and_the_step_counts(optimizer, dtype, wide):
    generator, params = start(dtype)
    state = optimizer.init(params)
    for grads in (draw(generator, params), {n: p.to(wide) for n, p in params.items()}):
        updates, state = optimizer.update(grads, state, params)
        numbers = [x for x in leaves(state) if x.is_floating_point()]
        counts = [x for x in leaves(state) if not x.is_floating_point()]
        assert all(x.dtype == wide for x in numbers + leaves(updates))
        assert counts
        assert all(x.dtype == torch.int64 and x.ndim == 0 for x in counts)
        assert {n: p.dtype for n, p in apply_updates(params, updates).items()} == dict.fromkeys(
            params, dtype
        )
    assert all(x == 2 for x in counts)


@every_optimizer
def test_a_private_step_takes_any_of_them(optimizer):
    init, step = make_train_step(lambda w, x: (w * x).sum(), MECHANISM, optimizer)
    batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(0))
    state, event = step(init(torch.zeros(3)), batch, random.key(0))
    assert state.params.shape == (3,)
    assert event == MECHANISM.event()


@pytest.mark.parametrize("name", ["averaged", "disk", "adam_bc", "scheduled"])
def test_a_whole_private_step_is_one_graph_as_the_rate_changes(name, fresh_compiler):
    init, step = make_train_step(lambda w, x: (w * x).sum(), MECHANISM, ALL[name])
    together = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = state = init(torch.zeros(3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(4):
            batch = Batch(torch.ones(4, 3), torch.ones(4, dtype=torch.bool), torch.tensor(t))
            state, _ = together(state, batch, random.key(0))
            eager, _ = step(eager, batch, random.key(0))
    torch.testing.assert_close(state, eager, rtol=1e-5, atol=1e-6)


def test_learning_rates_may_be_mapped_over():
    rates = torch.tensor([0.1, 0.2, 0.4])
    grads, params = torch.ones(2), torch.zeros(2)

    def moved(rate):
        optimizer = sgd(rate)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    torch.testing.assert_close(torch.vmap(moved)(rates), -rates[:, None].expand(3, 2))


def test_adam_bc_is_the_formula_of_its_paper():
    generator, params = start()
    optimizer = adam_bc(0.05, MECHANISM, b1=0.8, b2=0.95, floor=0.01)
    state = optimizer.init(params)
    first = second = torch.zeros(4, 3, dtype=torch.float64)
    phi = (3.0 * 2.0 / 4) ** 2
    floored = 0
    for t in range(1, 51):
        grads = {n: 2 * g for n, g in draw(generator, params).items()}
        updates, state = optimizer.update(grads, state, params)
        first = 0.8 * first + 0.2 * grads["w"]
        second = 0.95 * second + 0.05 * grads["w"] ** 2
        corrected = second / (1 - 0.95**t) - phi
        floored += int((corrected < 0.01).sum())
        expected = -0.05 * first / (1 - 0.8**t) / corrected.clamp(min=0.01).sqrt()
        torch.testing.assert_close(updates["w"], expected, rtol=1e-9, atol=0)
    assert 0 < floored < 600


def test_without_noise_adam_bc_is_adam():
    quiet = DPSGD(clipping=1.0, noise_multiplier=0.0, sampling_prob=0.1, expected_batch_size=4)
    generator, params = start()
    ours, theirs = adam_bc(0.05, quiet, floor=1e-12), adam(0.05, stabilizer=1e-300)
    a, b = ours.init(params), theirs.init(params)
    for _ in range(20):
        grads = draw(generator, params)
        x, a = ours.update(grads, a, params)
        y, b = theirs.update(grads, b, params)
        torch.testing.assert_close(x, y, rtol=1e-9, atol=0)


def test_the_variance_taken_out_is_that_of_the_noise_put_in():
    """The second moment of released noise alone is what adam_bc subtracts; 10 % off is seen."""
    none = torch.zeros(0, 40_000)
    noise = clip_and_noise(none, random.key(7), MECHANISM)
    variance = float(noise.double().square().mean())
    error = released_variance(MECHANISM) * math.sqrt(2 / 40_000)
    assert abs(variance - released_variance(MECHANISM)) < 5 * error
    assert abs(variance - 1.1 * released_variance(MECHANISM)) > 5 * error


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12), st.floats(0, 0.99), st.booleans())
def test_ema_has_the_weights_it_says(values, decay, unbiased):
    average = ema(decay=decay, unbiased=unbiased)
    state = average.init(torch.zeros(1, dtype=torch.float64))
    for value in values:
        found, state = average.update(torch.tensor([value], dtype=torch.float64), state, None)
    n = len(values)
    weights = [(1 - decay) * decay ** (n - 1 - i) for i in range(n)]
    expected = math.fsum(w * v for w, v in zip(weights, values, strict=True))
    expected /= math.fsum(weights) if unbiased else 1.0
    assert math.isclose(float(found), expected, rel_tol=1e-9, abs_tol=1e-9)


def test_ema_leaves_the_share_of_independent_noise_it_says():
    average = ema(decay=0.8)
    state = average.init(torch.zeros(50_000))
    for t in range(40):
        found, state = average.update(random.normal(random.key(t), (50_000,)), state, None)
    share = float(found.double().square().mean()) * (1 + 0.8) / (1 - 0.8)
    assert abs(share - 1) < 5 * math.sqrt(2 / 50_000)


def test_averaged_keeps_the_updates_and_averages_the_parameters():
    generator, params = start()
    plain, both = sgd(0.1, momentum=0.9), averaged(sgd(0.1, momentum=0.9), decay=0.9)
    a, b = plain.init(params), both.init(params)
    assert b.average["w"].equal(params["w"])
    assert b.average["w"].data_ptr() != params["w"].data_ptr()
    path = []
    for _ in range(10):
        grads = draw(generator, params)
        x, a = plain.update(grads, a, params)
        y, b = both.update(grads, b, params)
        assert x["w"].equal(y["w"])
        params = apply_updates(params, y)
        path.append(params["w"])
    weights = torch.tensor([0.9 ** (9 - i) for i in range(10)], dtype=torch.float64)
    mean = (weights[:, None, None] * torch.stack(path)).sum(0) / weights.sum()
    torch.testing.assert_close(b.average["w"], mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gain", [0.2, 0.7, 1.0])
def test_disk_is_the_recursion_of_its_paper(gain):
    """x, d and the filter written out, with a gradient that depends on where it is taken."""

    def gradient(at, t):
        return at**3 + torch.sin(at + t)

    gamma = (1 - gain) / gain
    inner = sgd(0.05, momentum=0.5, weight_decay=0.3)  # which reads the parameters
    x, d, filtered = torch.tensor([1.0, -2.0]).double(), 0.0, 0.0
    optimizer = disk(inner, gain=gain)
    y, plain = x, inner.init(x)
    state = optimizer.init(y)
    for t in range(30):
        torch.testing.assert_close(y, x + gamma * d)
        updates, state = optimizer.update(gradient(y, t), state, y)
        y = apply_updates(y, updates)
        filtered = (1 - gain) * filtered + gain * gradient(x + gamma * d, t)
        d, plain = inner.update(filtered, plain, x)
        x = x + d
        torch.testing.assert_close(disk_params(y, state), x)


def test_a_chain_is_one_after_the_other_and_associates():
    generator, params = start()
    a, b, c = ema(decay=0.5), ema(decay=0.9, unbiased=False), adamw(0.1)
    forms = [chain(a, b, c), chain(a, chain(b, c)), chain(chain(a, b), c)]
    states = [form.init(params) for form in forms]
    parts = [part.init(params) for part in (a, b, c)]
    for _ in range(5):
        expected = grads = draw(generator, params)
        for i, part in enumerate((a, b, c)):
            expected, parts[i] = part.update(expected, parts[i], params)
        for i, form in enumerate(forms):
            updates, states[i] = form.update(grads, states[i], params)
            assert all(updates[n].equal(expected[n]) for n in params)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: sgd(0.0), "learning_rate"),
        (lambda: sgd(0.1, momentum=1.5), "momentum"),
        (lambda: sgd(0.1, nesterov=True), "nesterov"),
        (lambda: sgd(0.1, weight_decay=-1), "weight_decay"),
        (lambda: sgd(torch.ones(2)), "learning_rate to be a 0-d"),
        (lambda: adam(float("nan")), "learning_rate"),
        (lambda: adam(0.1, b1=-1), "b1"),
        (lambda: adam(0.1, b2=1.0), "b2"),
        (lambda: adam(0.1).init({}), "at least one tensor"),
        (lambda: adam(0.1, stabilizer=0), "stabilizer"),
        (lambda: adamw(0.1, weight_decay=math.inf), "weight_decay"),
        (lambda: adam_bc(0.1, MECHANISM, floor=0), "floor"),
        (lambda: adam_bc(0.1, MECHANISM, b2=1), "b2"),
        (lambda: ema(decay=1.0), "decay"),
        (lambda: averaged(sgd(0.1), decay=-0.1), "decay"),
        (lambda: disk(sgd(0.1), gain=0.0), "gain"),
        (lambda: constant(-1), "rate"),
        (lambda: exponential_decay(0, decay=0.5), "initial"),
        (lambda: exponential_decay(1, decay=1.5), "decay"),
        (lambda: step_decay(1, decay=0.0, every=1), "decay"),
        (lambda: step_decay(1, decay=0.5, every=0), "every"),
        (lambda: cosine_decay(1, num_steps=5, num_warmup_steps=5), "num_steps"),
        (lambda: cosine_decay(1, num_steps=5, num_warmup_steps=-1), "num_warmup_steps"),
        (lambda: cosine_decay(1, num_steps=5, final=2), "final"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def step_of(optimizer):
    params = torch.ones(2)
    return optimizer.update(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sgd("0.1"), "learning_rate"),
        (lambda: sgd(torch.tensor(1)), "learning_rate to be a floating-point"),
        (lambda: step_of(sgd(lambda step: 0.1)), r"learning_rate\(step\)"),
        (lambda: step_of(sgd(lambda step: step)), r"learning_rate\(step\)"),
        (lambda: sgd(0.1).init(torch.ones(2, dtype=torch.int64)), "floating point"),
        (lambda: adam_bc(0.1, 1.0), "mechanism"),
        (lambda: chain(), "at least one"),
        (lambda: chain(ema(decay=0.5), sgd), "pair"),
        (lambda: averaged(sgd, decay=0.5), "pair"),
        (lambda: disk(adam, gain=0.5), "pair"),
    ],
)
def test_wrong_kinds_are_refused_by_name(make, words):
    with pytest.raises(TypeError, match=words):
        make()


def test_a_schedule_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"learning_rate\(step\) to be a 0-d"):
        step_of(sgd(lambda step: torch.ones(1)))
