"""Triton kernels and their launchers, shipped as ``tdeconv.kernels``: import them by that name only."""
