"""The fast plain-PyTorch backend: four stages, each with its gradient written out (see :mod:`tdeconv.corridor`).

Runs on any device; the choices in it were measured on CPUs (bench/results).
"""

from tdeconv.torch_backend.convolve import convolve, convolve_backward
from tdeconv.torch_backend.describe import describe
from tdeconv.torch_backend.fold import fold, fold_backward
from tdeconv.torch_backend.inverse_sqrt import inverse_sqrt, inverse_sqrt_backward, inverse_sqrt_saved
from tdeconv.torch_backend.patch_moments import patch_moments, patch_moments_backward_
from tdeconv.torch_backend.whiten import whiten_convolve, whiten_convolve_backward, whitened, whitens

__all__ = [
    "convolve",
    "convolve_backward",
    "describe",
    "fold",
    "fold_backward",
    "inverse_sqrt",
    "inverse_sqrt_backward",
    "inverse_sqrt_saved",
    "patch_moments",
    "patch_moments_backward_",
    "whiten_convolve",
    "whiten_convolve_backward",
    "whitened",
    "whitens",
]
