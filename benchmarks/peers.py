"""Everyone who takes a step in `./dev bench steps` and `./dev bench memory`: dpfunc, what it is
compared with, and the loop over single examples that all of them are checked against.
"""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from models import Model
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import dpfunc
from dpfunc import random
from dpfunc.gradients.clipped import METHODS

LEARNING_RATE = 0.1
NOISE_MULTIPLIER = 1.0
TOLERANCE = 1e-3
OPACUS_MODES = ("hooks", "functorch", "ew", "ghost")


class Contestant(NamedTuple):
    step: Callable[[], Any]
    """One whole step on the batch, from the parameters that the step before left."""
    clipped_sum: Callable[[], dict[str, Tensor]] | None = None
    """Before noise, at the initial parameters: to be called before any step. None: not private."""


class Reference(NamedTuple):
    clip_norm: float
    clipped_sum: dict[str, Tensor]

    def error(self, other: dict[str, Tensor]) -> float:
        """The norm of the difference over the norm of the sum."""
        gap = sum(
            float((other[n] - s).double().square().sum()) for n, s in self.clipped_sum.items()
        )
        norm = sum(float(s.double().square().sum()) for s in self.clipped_sum.values())
        return (gap / norm) ** 0.5


def reference(model: Model) -> Reference:
    """Clip at the median norm, one example after the other by plain autograd."""
    params = model.trainable()
    leaves = [p for p in model.module.parameters() if p.requires_grad]
    grads = []
    for x, y in zip(model.inputs.split(1), model.targets.split(1), strict=True):
        grads.append(torch.autograd.grad(model.criterion(model.module(x), y), leaves))
    # In float64: over the millions of entries of an embedding, float32 norms are wrong by 1e-4.
    squares = [[g.double().square().sum() for g in example] for example in grads]
    norms = torch.tensor(squares, dtype=torch.float64).sum(1).sqrt()
    clip_norm = float(norms.median())
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for example, norm in zip(grads, norms, strict=True):
        for out, g in zip(total, example, strict=True):
            out.add_(g, alpha=min(1.0, clip_norm / float(norm)))
    return Reference(clip_norm, dict(zip(params, total, strict=True)))


def contestants(
    model: Model, clip_norm: float, chunk_size: int | None = None
) -> dict[str, Callable[[], Contestant]]:
    """By name, how to make each. Making it raises where the contestant cannot run the model."""
    if chunk_size is not None:
        return {
            f"{name} chunk {chunk_size}": make
            for name, make in dpfunc_contestants(model, clip_norm, chunk_size).items()
        }
    return {
        "non-private eager": partial(eager, model),
        "non-private compiled": partial(compiled, model),
        "non-private compiled module": partial(compiled_module, model),
        **dpfunc_contestants(model, clip_norm),
        **{f"opacus {mode}": partial(opacus, model, clip_norm, mode) for mode in OPACUS_MODES},
        "opake eager": partial(opake, model, clip_norm),
        "opake compiled": partial(opake, model, clip_norm, compile=True),
    }


def eager(model: Model) -> Contestant:
    module = copy.deepcopy(model.native)
    return autograd_step(model, module, lambda x, y: model.criterion(module(x), y))


def compiled_module(model: Model) -> Contestant:
    """Forward and backward compiled, as `torch.compile(module)` gives them."""
    module = copy.deepcopy(model.module)
    loss = torch.compile(lambda x, y: model.criterion(module(x), y), fullgraph=True)
    return autograd_step(model, module, loss)


def autograd_step(
    model: Model, module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]
) -> Contestant:
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE, foreach=True)

    def step() -> None:
        loss(model.inputs, model.targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contestant(step)


def compiled(model: Model) -> Contestant:
    """The whole step in one graph, parameters updated in place."""
    module = copy.deepcopy(model.module)
    params = {name: p.clone() for name, p in model.trainable().items()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return model.criterion(functional_call(module, params, (x,)), y)

    @torch.compile(fullgraph=True)
    def step(params: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        grads = torch.func.grad(loss)(params, x, y)
        for name, p in params.items():
            p.sub_(grads[name], alpha=LEARNING_RATE)

    return Contestant(lambda: step(params, model.inputs, model.targets))


def dpfunc_contestants(
    model: Model, clip_norm: float, chunk_size: int | None = None
) -> dict[str, Callable[[], Contestant]]:
    forms = {
        f"dpfunc {method} {'compiled' if compile else 'eager'}": partial(
            ours, model, clip_norm, method=method, compile=compile, chunk_size=chunk_size
        )
        for method in METHODS
        if method != "bookkeeping"  # what "auto" is on every model here
        for compile in ((False,) if method == "two_pass" else (False, True))
    }
    in_place = partial(ours_in_place, model, clip_norm, chunk_size=chunk_size)
    return {**forms, "dpfunc auto in place": in_place}


def update(params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p - LEARNING_RATE * grads[name] for name, p in params.items()}


class Ours(NamedTuple):
    """What a step of dpfunc is made of."""

    loss: dpfunc.typing.Loss
    initial: dict[str, Tensor]
    mechanism: dpfunc.DPSGD
    batch: dpfunc.Batch
    key: Tensor


def parts(model: Model, clip_norm: float) -> Ours:
    loss, initial = dpfunc.functional_loss(copy.deepcopy(model.module), model.criterion)
    device, num = model.inputs.device, len(model.inputs)
    mechanism = dpfunc.DPSGD(
        clipping=clip_norm,
        noise_multiplier=NOISE_MULTIPLIER,
        sampling_prob=0.01,
        expected_batch_size=num,
    )
    mask = torch.ones(num, dtype=torch.bool, device=device)
    data = (model.inputs, model.targets)
    batch = dpfunc.Batch(data, mask, torch.tensor(0, device=device))
    return Ours(loss, initial, mechanism, batch, random.key(0, device=device))


def ours(
    model: Model, clip_norm: float, *, method: str, compile: bool, chunk_size: int | None
) -> Contestant:
    loss, initial, mechanism, batch, key = parts(model, clip_norm)
    options: dict[str, Any] = {"method": method, "chunk_size": chunk_size}
    dp_step = dpfunc.make_dp_step(loss, mechanism, update, **options)
    run = torch.compile(dp_step, fullgraph=True) if compile else dp_step
    params = initial

    def step() -> None:
        nonlocal params
        params, _event = run(params, batch, key)

    def clipped_sum() -> dict[str, Tensor]:
        total = dpfunc.clipped_grad(loss, clip_norm, **options)(
            initial, batch.data, mask=batch.mask
        ).sum
        if not compile:
            return total
        ahead, behind = dp_step(initial, batch, key)[0], run(initial, batch, key)[0]
        return moved(total, ahead, behind, len(batch.mask))

    return Contestant(step, clipped_sum)


def ours_in_place(model: Model, clip_norm: float, chunk_size: int | None) -> Contestant:
    """Compiled, parameters updated in place."""
    loss, initial, mechanism, batch, key = parts(model, clip_norm)
    sgd = dpfunc.optimizers.sgd(LEARNING_RATE)
    made = dpfunc.make_train_step(loss, mechanism, sgd, chunk_size=chunk_size)
    init, step = dpfunc.in_place(made)
    run = torch.compile(step, fullgraph=True)
    state = init(initial)

    def clipped_sum() -> dict[str, Tensor]:
        total = dpfunc.clipped_grad(loss, clip_norm)(initial, batch.data, mask=batch.mask).sum
        ahead, behind = made[1](made[0](initial), batch, key)[0], run(init(initial), batch, key)[0]
        return moved(total, ahead.params, behind.params, len(batch.mask))

    return Contestant(lambda: run(state, batch, key), clipped_sum)


def moved(
    total: dict[str, Tensor], ahead: dict[str, Tensor], behind: dict[str, Tensor], num: int
) -> dict[str, Tensor]:
    """The sum of a step that went behind, from that of one with the same noise that went ahead.

    The noise of a step is a function of its key: two steps differ by their clipped sums.
    """
    return {n: s + (ahead[n] - behind[n]) * (num / LEARNING_RATE) for n, s in total.items()}


def opacus(model: Model, clip_norm: float, mode: str) -> Contestant:
    module = copy.deepcopy(model.opacus).train()
    renamed = partial(re.sub, r"l0\.(ih|hh)\.(weight|bias)", r"\2_\1_l0")  # DPLSTM's own names
    names = [renamed(name) for name, p in module.named_parameters() if p.requires_grad]
    params = [p for p in module.parameters() if p.requires_grad]
    data = TensorDataset(model.inputs, model.targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its generator, which is not a secure one
        wrapped, optimizer, *rest = PrivacyEngine().make_private(
            module=module,
            optimizer=torch.optim.SGD(params, lr=LEARNING_RATE),
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, batch_size=len(data)),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=clip_norm,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    forward: Any = wrapped
    criterion: Any = rest[0] if mode == "ghost" else model.criterion

    def noisy_update() -> None:
        output = forward(model.inputs)
        if mode == "ghost" and output.ndim == 3:
            flat = output.flatten(0, 1), model.targets.flatten()
            loss = criterion(*flat, shape=output.shape)
        else:
            loss = criterion(output, model.targets)
        loss.backward()
        optimizer.step()

    def step() -> None:
        noisy_update()
        optimizer.zero_grad(set_to_none=True)  # last, so that nothing is held between steps

    def clipped_sum() -> dict[str, Tensor]:
        noisy_update()
        sums: list[Any] = [p.summed_grad for p in optimizer.params]  # pyright: ignore
        optimizer.zero_grad(set_to_none=True)
        return dict(zip(names, sums, strict=True))

    return Contestant(step, clipped_sum)


def opake(model: Model, clip_norm: float, *, compile: bool = False) -> Contestant:
    try:
        clipping = importlib.import_module("opake.dpsgd.clipping")
        noise = importlib.import_module("opake.dpsgd.noise")
        key = importlib.import_module("opake.random").key
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"not installed ({missing})") from missing
    loss, initial = dpfunc.functional_loss(copy.deepcopy(model.module), model.criterion)
    clipped_grad, clip_state = clipping.clipped_grad(
        lambda params, x, y: loss(params, (x, y)),
        clipping_norm=clip_norm,
        batch_argnums=(1, 2),
        normalize_by=len(model.inputs),
    )
    add_noise, noise_state = noise.gaussian_noise(noise_multiplier=NOISE_MULTIPLIER, key=key(0))
    gradient = torch.compile(clipped_grad) if compile else clipped_grad
    apply = torch.compile(update) if compile else update
    params = initial

    def step() -> None:
        nonlocal params, clip_state, noise_state
        grads, clip_state = gradient(params, model.inputs, model.targets, state=clip_state)
        noisy, noise_state = add_noise(grads, noise_state)
        params = apply(params, noisy.pytree)

    def clipped_sum() -> dict[str, Tensor]:
        grads, _ = gradient(initial, model.inputs, model.targets, state=clip_state)
        return {name: g * len(model.inputs) for name, g in grads.pytree.items()}

    return Contestant(step, clipped_sum)
