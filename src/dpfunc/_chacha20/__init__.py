"""The ChaCha20 keystream as two torch operators: `words` and `normals`.

Each is opaque to `torch.compile` (a meta rule gives the shape, so a step with noise in it compiles
as fast as one without), batches under `vmap`, and has one implementation a device: OpenSSL's
keystream on CPU, one Triton kernel on CUDA. Both are pure functions of their arguments.
"""

from dpfunc._chacha20.operators import MAX_WORDS, add_normals, normals, words

__all__ = ["MAX_WORDS", "add_normals", "normals", "words"]
