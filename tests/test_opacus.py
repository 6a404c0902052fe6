"""Opacus as oracle for per-sample gradients and for one step without noise."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfunc import clipped_grad, functional_loss, per_sample_grads

pytestmark = [
    pytest.mark.uses_global_generator,  # Opacus and nn's own initialisation do
    pytest.mark.filterwarnings("ignore"),
]


def models():
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(7, 6)
    yield (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        torch.randn(7, 2, 4, 4),
    )
    yield (
        nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3)),
        torch.randint(0, 9, (7, 5)),
    )


@pytest.mark.parametrize("index", range(3))
def test_per_sample_gradients_and_their_clipped_sum_equal_opacus(index):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        module, inputs = list(models())[index]
        labels = torch.randint(0, 3, (7,))
        loss, params = functional_loss(module, F.cross_entropy)
        ours = per_sample_grads(loss)(params, (inputs, labels))
        summed = clipped_grad(loss, 0.3)(params, (inputs, labels)).sum
        wrapped = GradSampleModule(module)
        optimizer = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=0.3,
            expected_batch_size=7,
        )
        F.cross_entropy(wrapped(inputs), labels).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(ours[name], parameter.grad_sample, rtol=1e-4, atol=1e-6)
        optimizer.clip_and_accumulate()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(summed[name], parameter.summed_grad, rtol=1e-4, atol=1e-5)
