"""What the kernels' lists for the ahead-of-time compiler share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tdeconv.kernels.configs import Config, Limits, Variant, cuda_limits

LIMITS = {
    "sm_80": cuda_limits(8, 0),
    "sm_90": cuda_limits(9, 0),
    "sm_100": cuda_limits(10, 0),
    "gfx942": Limits(shared=65536, registers=512, warp=64),
}
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)


def by_config(
    options: Callable[[Limits], Sequence[Config]], targets: Iterable[str]
) -> Iterator[tuple[Config, bool, tuple[str, ...]]]:
    """Each configuration, whether it is the heuristic choice (the first), and the targets where that is so."""
    found: dict[tuple[Config, bool], list[str]] = {}
    for target in targets:
        for i, config in enumerate(options(LIMITS[target])):
            found.setdefault((config, i == 0), []).append(target)
    for (config, default), where in found.items():
        yield config, default, tuple(where)


def variant(
    name: str,
    kernel: Any,
    config: Config,
    constexprs: dict[str, object],
    *,
    pointers: dict[str, str] | None = None,
    aligned: Iterable[str] = (),
    targets: tuple[str, ...] = (),
    wgmma: bool = False,
    default: bool = True,
) -> Variant:
    """A kernel whose arguments are float32 pointers, but for those named, and ints, of which ``aligned`` are multiples
    of 16. An int that is 1 at launch is part of what is compiled: it goes into ``constexprs``."""
    names = [n for n in kernel.arg_names if not n.isupper() and n not in constexprs]
    kinds = pointers or {}
    signature = {n: kinds.get(n, "*fp32") if n.endswith("_ptr") else "i32" for n in names}
    known = tuple(n for n in names if n.endswith("_ptr") or n in set(aligned))
    expected = {"sm_90": "wgmma"} if wgmma else {}
    return Variant(name, kernel, signature, constexprs, config, expected, targets, aligned=known, default=default)
