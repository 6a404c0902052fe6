"""The ChaCha20 keystream as three torch operators: `words`, `normals` and `add_normals`.

Each is opaque to `torch.compile` (a meta rule gives the shape, so a step with noise in it compiles
as fast as one without), batches under `vmap`, and has one implementation a device: OpenSSL's
keystream on CPU, Triton kernels on CUDA. All are pure functions of their arguments.
"""

from dpfunc._chacha20.operators import MAX_WORDS, add_normals, normals, words

__all__ = ["MAX_WORDS", "add_normals", "normals", "words"]
