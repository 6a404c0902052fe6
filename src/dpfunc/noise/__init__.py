"""Noise: from a clipped sum to a release."""

from dpfunc.noise.additive import privatize, privatize_queries, released_variance

__all__ = ["privatize", "privatize_queries", "released_variance"]
