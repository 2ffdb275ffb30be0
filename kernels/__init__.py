"""The Triton backend: four stages, each with its gradient (see :mod:`tdeconv.corridor`).

Import it as ``tdeconv.kernels`` only. Needs Triton; CPU tensors only under its interpreter (``TRITON_INTERPRET=1``).
float64 goes to the torch backend. Results are bitwise the same in every run.
"""

from tdeconv.kernels.convolve import convolve
from tdeconv.kernels.convolve_backward import convolve_backward
from tdeconv.kernels.describe import describe
from tdeconv.kernels.fold import fold, fold_backward
from tdeconv.kernels.inverse_sqrt import inverse_sqrt, inverse_sqrt_backward, inverse_sqrt_saved
from tdeconv.kernels.patch_moments import patch_moments
from tdeconv.kernels.patch_moments_backward import patch_moments_backward_

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
]
