"""From a torch module to a pure loss."""

from dpfunc.models.augmentation import average_over_augmentations
from dpfunc.models.functional import functional_loss

__all__ = ["average_over_augmentations", "functional_loss"]
