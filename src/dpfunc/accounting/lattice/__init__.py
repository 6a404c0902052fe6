"""Certified composition of privacy losses on a lattice.

A log's profile is delta(epsilon) = E[(1 - e^epsilon V)_+] under the product of the P, where V is the
product of the steps' v = e^-L = dQ/dP. It is convex and decreasing in each v, and increasing in the
measure: these three facts are all that the bounds use (docs/accountant.md has the proofs).

`outline` looks where the losses lie, `laws` puts each pair on the lattice, once above and once below,
`composition` takes the product, and `bounds` refines until the two are near.
"""

from dpfunc.accounting.lattice.bounds import lattice_delta as lattice_delta
from dpfunc.accounting.lattice.bounds import lattice_epsilon as lattice_epsilon
