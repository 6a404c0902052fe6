"""From a torch module to a pure loss."""

from dpfunc.models.functional import functional_loss

__all__ = ["functional_loss"]
