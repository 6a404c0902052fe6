"""The training layer: a run is a fold over steps, with a log and checkpoints that survive a kill."""

from dpfunc.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dpfunc.training.fit import Fitted, Saving, fit
from dpfunc.training.loop import Trained, train

__all__ = [
    "Checkpoint",
    "Fitted",
    "Saving",
    "Trained",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]
