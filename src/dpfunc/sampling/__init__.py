"""Which examples a step sees: Poisson sampling as a pure function of a key and a step."""

from dpfunc.sampling.batches import Batch, poisson_batches
from dpfunc.sampling.poisson import overflow_probability, poisson_indices

__all__ = ["Batch", "overflow_probability", "poisson_batches", "poisson_indices"]
