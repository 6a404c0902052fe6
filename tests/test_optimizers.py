"""Optimizers against torch.optim over fifty steps."""

import pytest
import torch

from dpfunc.optimizers import adam, apply_updates, sgd

CASES = [
    (sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    (sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    (
        sgd(0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ),
    (adam(0.05), lambda p: torch.optim.Adam(p, lr=0.05)),
    (
        adam(0.05, b1=0.5, b2=0.9, stabilizer=1e-3),
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.9), eps=1e-3),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_fifty_steps_equal_torch_optim(ours, theirs, compiled, fresh_compiler):
    generator = torch.Generator().manual_seed(0)
    params = {
        "w": torch.randn(4, 3, generator=generator, dtype=torch.float64),
        "b": torch.zeros((), dtype=torch.float64),
    }
    reference = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = theirs(reference.values())
    state = ours.init(params)
    update = ours.update
    if compiled:
        update = torch.compile(update, fullgraph=True, backend="aot_eager")
    for _ in range(50):
        grads = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()
        }
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
        for name, p in reference.items():
            p.grad = grads[name].clone()
        optimizer.step()
        for name, p in reference.items():
            torch.testing.assert_close(params[name], p.detach(), rtol=1e-6, atol=1e-9)


def test_arguments_are_unchanged():
    optimizer = adam(0.1)
    params, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    state = optimizer.init(params)
    optimizer.update(grads, state, params)
    assert state.step == 0
    assert (state.first["w"] == 0).all()
    assert (params["w"] == 1).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: sgd(0.0), "learning_rate"),
        (lambda: sgd(0.1, momentum=1.5), "momentum"),
        (lambda: adam(float("nan")), "learning_rate"),
        (lambda: adam(0.1, b1=-1), "b1"),
        (lambda: adam(0.1, b2=1.0), "b2"),
        (lambda: adam(0.1).init({}), "at least one tensor"),
        (lambda: adam(0.1, stabilizer=0), "stabilizer"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, name):
    with pytest.raises(ValueError, match=name):
        make()
