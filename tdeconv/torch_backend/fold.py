"""Third stage: the inverse root and the mean folded into weight and bias, a few output channels at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tdeconv.geometry import Geometry
from tdeconv.reference import weight_from_vectors, weight_vectors
from tdeconv.torch_backend import gemm
from tdeconv.torch_backend.chunks import chunk_rows


def _parts(weight: Tensor, geo: Geometry) -> Iterator[slice]:
    """Output channels worked on together: all of them where the vectors are views already."""
    out = weight.shape[0]
    step = chunk_rows(weight[0].numel(), weight.device) if geo.interleaved and geo.pooled > 1 else out
    for first in range(0, out, step):
        yield slice(first, first + step)


def channels_last_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty weight whose channels are innermost: one tap's ``(O, C/groups)`` is then a matrix in place."""
    o, c, *kernel = weight.shape
    return weight.new_empty((o, *kernel, c), dtype=dtype).movedim(-1, 1)


def fold(weight: Tensor, bias: Tensor | None, mean: Tensor, deconv: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    folded = channels_last_weight(weight, deconv.dtype)
    shift = folded.new_zeros(weight.shape[0]) if bias is None else bias.to(deconv.dtype, copy=True)
    for part in _parts(weight, geo):
        w = weight[part]
        vectors = gemm.product(weight_vectors(w.to(deconv.dtype), geo), deconv)
        folded[part] = weight_from_vectors(vectors, geo, w.shape)
        shift[part] -= (vectors @ mean.unsqueeze(-1)).view(w.shape[0], -1).sum(1)
    return folded, shift


def fold_backward(
    grad_weight: Tensor,
    grad_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    deconv: Tensor,
    geo: Geometry,
    need_statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    unfolded = torch.empty_like(weight, dtype=deconv.dtype)
    grad_mean, grad_deconv = torch.zeros_like(mean).unsqueeze(-1), torch.zeros_like(deconv)
    for part in _parts(weight, geo):
        w, per_vector = weight[part], grad_bias[part].view(geo.groups, -1, 1).repeat_interleave(geo.pooled, dim=1)
        grad = weight_vectors(grad_weight[part], geo)
        own = grad.data_ptr() != grad_weight[part].data_ptr()  # a copy: fresh memory is dear, and not taken twice
        # what reaches the folded weight through the folded bias is a product of vectors
        grad = torch.addcmul(grad, per_vector, mean.unsqueeze(1), value=-1, out=grad if own else None)
        unfolded[part] = weight_from_vectors(gemm.product(grad, deconv), geo, w.shape)
        if need_statistics:
            vectors = weight_vectors(w.to(deconv.dtype), geo)
            grad_mean.baddbmm_(vectors.mT, per_vector)
            gemm.add_product_(grad_deconv, vectors.mT, grad)
    if not need_statistics:
        return unfolded, None, None
    return unfolded, -(deconv @ grad_mean).squeeze(-1), grad_deconv
