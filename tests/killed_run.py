"""A run that a test kills: `python killed_run.py FOLDER NUM_STEPS KILLS` prints how many kills hit it.

Each kill is a SIGKILL of a process of its own, which was forked before torch computed anything.
"""

import os
import random as chance
import signal
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import dpfunc
from dpfunc import optimizers, random
from dpfunc.training import Saving, fit

MECHANISM = dpfunc.DPSGD(
    clipping=dpfunc.AdaptiveClipping(initial=0.5, noise_multiplier=4.0),
    noise_multiplier=dpfunc.schedules.exponential(2.0, decay=0.999, num_steps=400),
    sampling_prob=0.3,
    expected_batch_size=12,
)


def shifted(example, key):
    x, y = example
    return x + 0.1 * random.normal(key, x.shape), y


def pair():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    loss, params = dpfunc.functional_loss(module, F.cross_entropy, has_key=True)
    loss = dpfunc.average_over_augmentations(loss, shifted, num=2, has_key=True)
    made = dpfunc.make_train_step(loss, MECHANISM, optimizers.adam(0.02), has_key=True)
    return made, params


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, generator=g), torch.arange(40) % 3


def main(folder, num_steps, sleep=0.0):
    (init, step), params = pair()

    def evaluate(state):
        time.sleep(sleep)
        return {"loss": float(state.params["0.weight"].square().mean())}

    return fit(
        (init, step),
        params,
        data(),
        MECHANISM,
        random.key(7),
        num_steps=num_steps,
        delta=1e-5,
        evaluate=evaluate,
        evaluate_every=1,
        saving=Saving(folder=folder, every=7),
        progress=False,
    )


def forked(folder, num_steps, sleep):
    pid = os.fork()
    if pid == 0:
        try:
            main(folder, num_steps, sleep)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def killed(folder, num_steps, kills):
    """Kill the run so many times, at random moments, and then let it end."""
    clock, hits = chance.Random(3), 0
    for _ in range(kills):
        pid = forked(folder, num_steps, 0.02)
        time.sleep(clock.uniform(0.02, 0.35))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
        hits += os.WIFSIGNALED(status)
    _, status = os.waitpid(forked(folder, num_steps, 0.0), 0)
    assert os.WEXITSTATUS(status) == 0
    return hits


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(killed(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
