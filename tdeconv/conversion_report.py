"""What a conversion did with every layer, and why: a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tdeconv.layers import Delinear
from tdeconv.plan import DECONVS, is_norm, num_features


@dataclass(frozen=True)
class ConversionRow:
    """One layer of a :class:`ConversionReport`: its name, what it was and became, and why.

    ``action`` is ``"converted"`` (into a deconvolution layer), ``"removed"`` (a batch norm) or ``"left"``; or
    ``"disabled"`` of modules with a method, such as timm's ``reparameterize``, that would merge what was converted.
    """

    name: str
    was: str
    action: str
    became: str
    why: str


@dataclass
class ConversionReport:
    """What :func:`convert_deconv` did with every convolution, batch norm and linear layer, and why.

    A norm of another kind behind a deconvolution layer has a row too: it is left, and may be needless.
    ``print(report)`` shows a table, ``summary`` is its last line; ``converted``, ``removed`` and ``left`` are the rows
    of each kind.
    """

    rows: list[ConversionRow] = field(default_factory=list)

    @property
    def converted(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "converted"]

    @property
    def removed(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "removed"]

    @property
    def left(self) -> list[ConversionRow]:
        return [row for row in self.rows if row.action == "left"]

    @property
    def summary(self) -> str:
        """How many layers were converted, removed and left, in one line."""
        counts = len(self.converted), len(self.removed), len(self.left)
        total = "layers converted: {}; batch norms removed: {}; left: {}".format(*counts)
        return total if self.rows else f"{total}: the model has no convolution, batch norm or linear layer"

    def __str__(self) -> str:
        if not self.rows:
            return self.summary
        cells = [("layer", "was", "became", "why"), *((r.name, r.was, r.became, r.why) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:], "", self.summary])


def describe(module: Any) -> str:
    """``Conv2d(3, 64, 7x7)`` and the like, short enough for a table."""
    name = type(module).__name__
    if isinstance(module, _ConvNd):
        sizes = [str(module.in_channels), str(module.out_channels), "x".join(map(str, module.kernel_size))]
        sizes += [f"groups={module.groups}"] if module.groups > 1 else []
        if isinstance(module, DECONVS):
            sizes = [f"block={module.block}", f"n_iter={module.n_iter}", *(["freeze"] if module.freeze else [])]
        return f"{name}({', '.join(sizes)})"
    if isinstance(module, Delinear):
        return f"{name}(block={module.block}, n_iter={module.n_iter})"
    if isinstance(module, nn.Linear):
        return f"{name}({module.in_features}, {module.out_features})"
    return f"{name}({num_features(module)})" if is_norm(module) else name
