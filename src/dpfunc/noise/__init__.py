"""Noise on a clipped sum: the release point."""

from dpfunc.noise.gaussian import privatize

__all__ = ["privatize"]
