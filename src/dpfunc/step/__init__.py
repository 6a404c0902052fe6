"""Algorithm 1 of Abadi et al. 2016 in one place: clip, sum, noise, divide (`release`), update (`make`).

The first line of that algorithm, the sample, is the batch: `poisson_batches` makes it from the same
mechanism and the same key. A batch larger than memory is taken in parts (`virtual`).
"""

from dpfunc.step.in_place import in_place
from dpfunc.step.make import PartialEvent, TrainState, make_dp_step, make_train_step
from dpfunc.step.release import clip_and_noise, private_grad
from dpfunc.step.virtual import Accumulated, Accumulator, make_accumulator, parts_of

__all__ = [
    "Accumulated",
    "Accumulator",
    "PartialEvent",
    "TrainState",
    "clip_and_noise",
    "in_place",
    "make_accumulator",
    "make_dp_step",
    "make_train_step",
    "parts_of",
    "private_grad",
]
