"""The networks that `./dev bench steps` and `./dev bench memory` train, each with a batch in memory.

Batches are random; what is measured does not depend on what is learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from opacus.layers import DPLSTM
from torch import Tensor, nn


class Model(NamedTuple):
    """A network, and one batch to step on. The parameters that require grad are trained."""

    name: str
    module: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor
    native: nn.Module
    """The same network and parameters in torch's fastest layers, which transforms may not know."""
    opacus: nn.Module
    """The same network and parameters in layers that Opacus knows."""

    def to(self, device: str) -> Model:
        tensors_and_modules = (Tensor, nn.Module)
        return self._make(x.to(device) if isinstance(x, tensors_and_modules) else x for x in self)

    def trainable(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.module.named_parameters() if p.requires_grad}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the batch, and over the positions of a sequence."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def model(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[torch.Generator], Tensor],
    targets: Callable[[torch.Generator], Tensor],
) -> Model:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make()
    x, y = inputs(generator), targets(generator)
    return Model(name, module, cross_entropy, x, y, copy.deepcopy(module), copy.deepcopy(module))


def normals(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator)


def integers(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(high, shape, generator=generator)


def mlp() -> Model:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )

    return model("mlp", make, normals(256, 784), integers(10, 256))


def mnist_cnn() -> Model:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    return model("mnist_cnn", make, normals(256, 1, 28, 28), integers(10, 256))


def vgg() -> Model:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        before = 3
        for channels in (32, 64, 128):
            for width in (before, channels):
                layers += [
                    nn.Conv2d(width, channels, 3, padding=1),
                    nn.GroupNorm(8, channels),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2))
            before = channels
        head = [nn.Flatten(), nn.Linear(128 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10)]
        return nn.Sequential(*layers, *head)

    return model("vgg", make, normals(64, 3, 32, 32), integers(10, 64))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, in layers that every contestant can hook or trace."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(masked, -torch.inf).softmax(-1)
        x = x + self.project((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    masked: Tensor
    positions: Tensor

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.register_buffer("masked", torch.ones(length, length, dtype=torch.bool).triu(1))
        self.register_buffer("positions", torch.arange(length))

    def forward(self, tokens: Tensor) -> Tensor:
        # Repeated, because Opacus wants a batch axis on the input of every layer.
        x = self.token(tokens) + self.position(self.positions.repeat(len(tokens), 1))
        for block in self.blocks:
            x = block(x, self.masked)
        return self.head(self.norm(x))


def transformer() -> Model:
    tokens = integers(8192, 16, 129)
    return model(
        "transformer",
        lambda: Decoder(8192, length=128, width=256, heads=4, depth=4),
        lambda generator: tokens(generator)[:, :-1].contiguous(),
        lambda generator: tokens(generator.manual_seed(0))[:, 1:].contiguous(),
    )


class LoopLSTM(nn.Module):
    """`nn.LSTM` as a loop, with its names and numbers: vmap and torch.compile do not take nn.LSTM."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        for name, parameter in nn.LSTM(inputs, hidden).named_parameters():
            self.register_parameter(name, parameter)
        self.hidden = hidden

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        projected = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        h = c = x.new_zeros(len(x), self.hidden)
        outputs = []
        for t in range(x.shape[1]):
            gates = projected[:, t] + F.linear(h, self.weight_hh_l0, self.bias_hh_l0)
            i, f, g, o = gates.chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


class Classifier(nn.Module):
    def __init__(self, lstm: nn.Module) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(1000, 64), lstm, nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


def lstm() -> Model:
    made = model(
        "lstm", lambda: Classifier(LoopLSTM(64, 128)), integers(1000, 64, 32), integers(10, 64)
    )
    native = Classifier(nn.LSTM(64, 128, batch_first=True))
    opacus = Classifier(DPLSTM(64, 128, batch_first=True))
    for other in (native, opacus):
        for name, part in made.module.named_children():
            # Part by part: DPLSTM translates the names of its parameters when asked itself.
            other.get_submodule(name).load_state_dict(part.state_dict())
    return made._replace(native=native, opacus=opacus)


class Adapted(nn.Module):
    """A frozen linear layer and a trained one of low rank beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.b(self.a(x))


class AdaptedBlock(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width).requires_grad_(False)
        self.up, self.down = Adapted(width, rank), Adapted(width, rank)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def lora() -> Model:
    def make() -> nn.Module:
        head = nn.Linear(512, 64).requires_grad_(False)
        return nn.Sequential(*(AdaptedBlock(512, 8) for _ in range(4)), head)

    return model("lora", make, normals(32, 64, 512), integers(64, 32, 64))


MODELS: dict[str, Callable[[], Model]] = {
    make.__name__: make for make in (mlp, mnist_cnn, vgg, transformer, lstm, lora)
}
