"""Optimizers of others: TorchOpt as a pair, torch.optim through .grad, both on private gradients."""

import pytest
import torch
from torch import nn

from dpfunc import DPSGD, Batch, clip_and_noise, functional_loss, per_sample_grads, random
from dpfunc import make_train_step as train_step
from dpfunc.optimizers import (
    adamw,
    apply_updates,
    chain,
    cosine_decay,
    ema,
    from_torchopt,
    sgd,
    write_grads,
)

MECHANISM = DPSGD(clipping=1.0, noise_multiplier=0.8, sampling_prob=0.5, expected_batch_size=8)
KEY = random.key(3)


def problem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(1)
    data = (
        torch.randn(8, 5, generator=generator, dtype=torch.float64),
        torch.randint(3, (8,), generator=generator),
    )
    loss, params = functional_loss(module, nn.functional.cross_entropy)
    return module, loss, params, data


def released(loss, params, data, step):
    return clip_and_noise(
        per_sample_grads(loss)(params, data), random.fold_in(KEY, step), MECHANISM
    )


def test_a_private_run_on_torch_optim_equals_the_one_on_our_own():
    module, loss, params, data = problem()
    optimizer = adamw(cosine_decay(0.05, num_steps=20), weight_decay=0.1)
    state = optimizer.init(params)
    theirs = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20)
    for step in range(20):
        updates, state = optimizer.update(released(loss, params, data, step), state, params)
        params = apply_updates(params, updates)
        now = {name: p.detach() for name, p in module.named_parameters()}
        write_grads(module, released(loss, now, data, step))
        theirs.step()
        rates.step()
        for name, p in module.named_parameters():
            torch.testing.assert_close(params[name], p.detach(), rtol=1e-6, atol=1e-9)


TRANSFORMS = {
    "sgd": lambda t: t.sgd(0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda t: t.adam(0.05),
    "adamw": lambda t: t.adamw(0.05, weight_decay=0.1),
    "rmsprop": lambda t: t.rmsprop(0.05),
    "chain": lambda t: t.combine.chain(t.clip.clip_grad_norm(1.0), t.adam(0.05)),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_torchopt_transform_drops_into_a_private_step_and_changes_nothing_given(make):
    torchopt = pytest.importorskip("torchopt")
    _, loss, params, data = problem()
    init, step = train_step(loss, MECHANISM, from_torchopt(make(torchopt)))
    batch = Batch(data, torch.ones(8, dtype=torch.bool), torch.tensor(0))
    state = init(params)
    for t in range(3):
        before = torch.utils._pytree.tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
        )
        now = batch._replace(step=torch.tensor(t))
        new, event = step(state, now, KEY)
        again, _ = step(state, now, KEY)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        torch.testing.assert_close(new, again, rtol=0, atol=0)
        assert event == MECHANISM.event()
        assert not new.params["0.weight"].equal(state.params["0.weight"])
        state = new


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (lambda t: t.sgd(0.1, momentum=0.9), sgd(0.1, momentum=0.9)),
        (lambda t: t.adamw(0.05, weight_decay=0.1), adamw(0.05, weight_decay=0.1)),
    ],
    ids=["sgd", "adamw"],
)
def test_torchopt_and_our_own_agree_on_a_private_run(make, ours):
    torchopt = pytest.importorskip("torchopt")
    _, loss, params, data = problem()
    runs = [train_step(loss, MECHANISM, o) for o in (ours, from_torchopt(make(torchopt)))]
    states = [init(params) for init, _ in runs]
    for t in range(10):
        batch = Batch(data, torch.ones(8, dtype=torch.bool), torch.tensor(t))
        states = [step(s, batch, KEY)[0] for s, (_, step) in zip(states, runs, strict=True)]
    # TorchOpt's AdamW keeps its bias corrections in float32.
    torch.testing.assert_close(states[0].params, states[1].params, rtol=1e-4, atol=1e-5)


def test_a_torchopt_transform_leaves_the_gradients_it_is_given():
    torchopt = pytest.importorskip("torchopt")
    optimizer = from_torchopt(torchopt.sgd(0.1, momentum=0.9))
    params, grads = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    optimizer.update(grads, optimizer.init(params), params)
    assert (grads["w"] == 1).all()


def test_a_transform_joins_a_chain():
    torchopt = pytest.importorskip("torchopt")
    both = chain(ema(decay=0.5), from_torchopt(torchopt.sgd(0.1)))
    params, grads = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    updates, _ = both.update(grads, both.init(params), params)
    torch.testing.assert_close(updates["w"], torch.full((2,), -0.1))


def test_the_class_of_a_transform_and_a_function_are_refused():
    for wrong in (sgd, torch.optim.SGD, None):
        with pytest.raises(TypeError, match="transform"):
            from_torchopt(wrong)


@pytest.mark.uses_global_generator
def test_written_gradients_are_copies_in_the_dtype_of_the_parameter():
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    grads = {name: torch.full(p.shape, 0.1) for name, p in layer.named_parameters()}
    write_grads(layer, grads)
    assert layer.weight.grad.dtype == torch.bfloat16
    same = nn.Linear(3, 2)
    write_grads(same, grads)
    same.weight.grad.zero_()
    assert (grads["weight"] == 0.1).all()


@pytest.mark.uses_global_generator
def test_no_gradient_from_before_is_left_anywhere():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    layer.bias.requires_grad_(False)
    assert layer.bias.grad is not None
    write_grads(layer, {"weight": torch.zeros(2, 3)})
    assert layer.bias.grad is None
    assert (layer.weight.grad == 0).all()


@pytest.mark.uses_global_generator
def test_parameters_may_be_a_dict():
    layer = nn.Linear(3, 2)
    write_grads({"w": layer.weight}, {"w": torch.ones(2, 3)})
    assert (layer.weight.grad == 1).all()
    assert layer.bias.grad is None


W, B = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("grads", "kind", "words"),
    [
        ({"weight": W}, ValueError, r"none for \['bias'\]"),
        ({}, ValueError, "bias"),
        ({"weight": W, "bias": B, "scale": B}, ValueError, r"got \['scale'\]"),
        ({"weight": W, "bias": torch.ones(4, 2)}, ValueError, r"'bias'\] of shape \(2,\)"),
        ({"weight": W, "bias": None}, TypeError, "tensors by name"),
        ([W, B], TypeError, "grads"),
    ],
)
@pytest.mark.uses_global_generator
def test_gradients_that_do_not_fit_are_refused_and_nothing_is_written(grads, kind, words):
    layer = nn.Linear(3, 2)
    with pytest.raises(kind, match=words):
        write_grads(layer, grads)
    assert layer.weight.grad is None
    assert layer.bias.grad is None


@pytest.mark.uses_global_generator
def test_a_frozen_parameter_and_a_list_of_parameters_are_refused():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="bias"):
        write_grads(layer, {"weight": W, "bias": B})
    with pytest.raises(TypeError, match="parameters"):
        write_grads(list(layer.parameters()), {"weight": W})
