"""The run of the README: a small convolutional network on real handwritten digits, privately."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dpfunc import optimizers, random
from dpfunc.accounting import Statement, calibrate_noise_multiplier
from dpfunc.accounting.logfile import replace_file
from dpfunc.events import AnyLog
from dpfunc.gradients import clipped_grad
from dpfunc.mechanism import DPSGD
from dpfunc.models import functional_loss
from dpfunc.step import make_train_step
from dpfunc.typing import Key, Params


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was tuned: for "digits" over validation splits alone, for "mnist" not at all."""

    channels: int
    kernel: int
    pool: int
    l2_clip_norm: float
    expected_batch_size: int
    num_steps: int
    learning_rate: float
    momentum: float
    averaging: float


UNIT = "training image with its label"

SETTINGS = {
    "digits": Settings(
        channels=6,
        kernel=3,
        pool=1,
        l2_clip_norm=1.0,
        expected_batch_size=560,
        num_steps=60,
        learning_rate=1.0,
        momentum=0.5,
        averaging=0.9,
    ),
    "mnist": Settings(
        channels=6,
        kernel=5,
        pool=2,
        l2_clip_norm=1.0,
        expected_batch_size=1024,
        num_steps=300,
        learning_rate=1.0,
        momentum=0.5,
        averaging=0.9,
    ),
}


class Split(NamedTuple):
    """Images (n, 1, side, side) in [0, 1] and labels (n,)."""

    images: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """A fixed random quarter is for the test; a sixth of the rest is for validation."""

    train: Split
    validation: Split
    test: Split


class Network(nn.Module):
    """One convolution, then one linear layer on features of fixed mean and variance."""

    def __init__(self, side: int, settings: Settings, key: Key) -> None:
        super().__init__()
        channels, kernel = settings.channels, settings.kernel
        features = channels * (side // settings.pool) ** 2
        self.convolution = nn.Conv2d(1, channels, kernel, padding=kernel // 2)
        self.pool = nn.AvgPool2d(settings.pool)
        self.normalise = nn.LayerNorm(features, elementwise_affine=False)
        self.readout = nn.Linear(features, 10)
        weight = 2 * random.uniform(key, self.convolution.weight.shape) - 1
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.convolution.weight.copy_(weight * 3 / kernel)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(F.gelu(self.convolution(images - 0.3)))
        return self.readout(self.normalise(features.flatten(1)))


def load(name: str) -> Digits:
    """Load "digits" (1797 images, comes with scikit-learn) or "mnist" (70000, downloaded).

    Raises:
        ConnectionError: MNIST could not be downloaded.
        ValueError: another name.
    """
    from sklearn import datasets

    if name == "digits":
        images, labels = datasets.load_digits(return_X_y=True)
        images = images / 16.0
    elif name == "mnist":
        try:
            images, labels = datasets.fetch_openml(
                "mnist_784", version=1, return_X_y=True, as_frame=False
            )
        except OSError as error:
            raise ConnectionError(
                f"Could not download MNIST from openml.org ({error}). "
                "Try again with a network, or use --data digits, which needs none."
            ) from error
        images = images / 255.0
    else:
        raise ValueError(f"Expected data to be 'digits' or 'mnist', got {name!r}.")
    side = math.isqrt(images.shape[1])
    all_images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, side, side)
    all_labels = torch.tensor(np.asarray(labels, dtype=np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(all_labels)))
    num_test = len(order) // 4
    num_validation = (len(order) - num_test) // 6
    test, validation, train = order.split(
        [num_test, num_validation, len(order) - num_test - num_validation]
    )
    return Digits(*(Split(all_images[i], all_labels[i]) for i in (train, validation, test)))


def accuracy(module: nn.Module, params: Params, split: Split) -> float:
    """The share of a split that is classified correctly."""
    with torch.no_grad():
        chosen = functional_call(module, params, (split.images,), strict=True).argmax(1)
    return (chosen == split.labels).float().mean().item()


def mechanism_for(digits: Digits, settings: Settings, target_epsilon: float, delta: float) -> DPSGD:
    """The record of a run that ends at target_epsilon. The size of the data set is taken as public."""
    sampling_prob = min(1.0, settings.expected_batch_size / len(digits.train.labels))
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=target_epsilon,
        delta=delta,
        sampling_prob=sampling_prob,
        num_steps=settings.num_steps,
    )
    return DPSGD(
        clipping=settings.l2_clip_norm,
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        expected_batch_size=settings.expected_batch_size,
    )


def pair(module: Network, settings: Settings, mechanism: DPSGD) -> tuple[Any, Params]:
    """The (init, step) of a run, whose optimizer keeps the average of the parameters, and its params."""
    loss, params = functional_loss(module, F.cross_entropy)
    descent = optimizers.sgd(settings.learning_rate, momentum=settings.momentum)
    optimizer = optimizers.averaged(descent, decay=settings.averaging)
    return make_train_step(loss, mechanism, optimizer), params


def gradient_norms(module: Network, digits: Digits, params: Params, l2_clip_norm: float) -> Tensor:
    """Norms of the training examples' gradients before clipping. PRIVATE."""
    loss, _ = functional_loss(module, F.cross_entropy)
    few = tuple(leaf[:2000] for leaf in digits.train)
    return clipped_grad(loss, l2_clip_norm, chunk_size=256)(params, few).norms


def statement_for(log: AnyLog, delta: float, seeded: bool) -> Statement:
    """The claim about a run of this file."""
    caveats = [
        "model, clip norm, batch, steps and learning rate were tuned on a validation split; that "
        "tuning is not accounted.",
        "validation and test accuracy come from examples that no step reads; they are not noised.",
        "the number of training examples is taken as public: it sets the sampling probability.",
    ]
    if seeded:
        caveats.insert(
            0, "the key comes from a seed: reproducible, not private to whoever knows it."
        )
    return Statement(
        log=log,
        delta=delta,
        unit=UNIT,
        released="every iterate's noisy gradient, and so all parameters, in params.safetensors too",
        caveats=tuple(caveats),
    )


def save(folder: Path, params: Params, statement: Statement) -> None:
    """Write what is released: the statement, and the parameters with it."""
    from safetensors.torch import save as to_bytes

    replace_file(folder / "statement.txt", f"{statement}\n".encode())
    metadata = {"statement": statement.to_json()}
    replace_file(folder / "params.safetensors", to_bytes(params, metadata=metadata))
