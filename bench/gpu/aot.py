"""Compile every shipped kernel for GPUs that are not here, and read what came out.

``python -m bench.gpu.aot --out DIR`` compiles each variant for sm_80, sm_90, sm_100 and gfx942 (and each kernel once
more with all sizes 1), prints a table
(registers, spills, shared memory, matrix instructions) and writes ``aot.json`` and ``aot.md``, keeping there what an
earlier run with the same Triton has found about other variants. It fails if a kernel does not compile, spills on sm_90,
asks for more shared memory than the device has, or lacks the matrix instruction it is meant to use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import tdeconv.kernels


class Target(NamedTuple):
    """A GPU to compile for."""

    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes a program may ask for
    instruction: str  # its matrix instruction, as the assembly spells it


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 232448, "wgmma.mma_async"),
    "sm_100": Target("cuda", 100, 32, 232448, "tcgen05.mma"),
    "gfx942": Target("hip", "gfx942", 64, 65536, "v_mfma"),
}
# What ``expected`` may ask for -> how it begins in PTX or AMD assembly
_SPELLED = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma", "mfma": "v_mfma"}

ONES = "sizes=1"  # ends the name of a variant whose ints are all 1


@dataclass
class Row:
    """A variant on a target. ``spills`` counts the instructions (NVIDIA) or registers (AMD) that go through memory."""

    name: str
    config: str
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: dict[str, int] | None = None
    seconds: float = 0.0
    problem: str = ""


def variants(only: str = "", quick: bool = False) -> Iterator[Any]:
    """Every variant to compile whose name contains ``only``; with ``quick``, without the tuner's other candidates."""
    known = list(_shipped())
    ones = map(_of_ones, {v.fn: v for v in reversed(known)}.values())
    yield from (v for v in [*known, *ones] if only in v.name and (v.default or not quick))


def _shipped() -> Iterator[Any]:
    for info in pkgutil.iter_modules(tdeconv.kernels.__path__):
        module = importlib.import_module(f"tdeconv.kernels.{info.name}")
        own = getattr(module, "variants", None)
        if own is not None and own.__module__ == module.__name__:
            yield from own()


def _of_ones(variant: Any) -> Any:
    """The same kernel where every size and stride is 1: Triton makes a constant of an int that is 1 at launch, so code
    that takes it for a tensor does not compile. That is the same on every target."""
    ones = {name: 1 for name, kind in variant.signature.items() if not kind.startswith("*")}
    pointers = {name: kind for name, kind in variant.signature.items() if name not in ones}
    return replace(
        variant, name=f"{variant.name} {ONES}", signature=pointers, constexprs={**variant.constexprs, **ones},
        expected={}, targets=("sm_90",), aligned=None,
    )  # fmt: skip


def compile_for(variant: Any, target: Target) -> Any:
    """The compiled kernel."""
    constexprs = {**variant.constexprs, **dict(variant.config.blocks)}
    signature = {n: "constexpr" if n in constexprs else variant.signature[n] for n in variant.fn.arg_names}
    aligned = variant.aligned
    if aligned is None:
        aligned = tuple(n for n, kind in signature.items() if kind.startswith("*"))
    attrs = {(variant.fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=variant.fn, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": variant.config.num_warps, "num_stages": variant.config.num_stages, **variant.options}
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    """Registers, spills and the PTX, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        run = [subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
               for flag in ("--dump-resource-usage", "-sass")]  # fmt: skip
    registers = int(re.search(r"REG:(\d+)", run[0]).group(1))  # type: ignore[union-attr]
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", run[1])), compiled.asm["ptx"]


def _amd(compiled: Any) -> tuple[int, int, str]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    return number("vgpr_count"), number("vgpr_spill_count") + number("sgpr_spill_count"), text


def inspect(variant: Any, name: str) -> Row:
    """Compile one variant for one target and judge it."""
    target, start = TARGETS[name], time.monotonic()
    row = Row(variant.name, str(variant.config), name)
    try:
        compiled = compile_for(variant, target)
        row.registers, row.spills, text = (_nvidia if target.backend == "cuda" else _amd)(compiled)
    except Exception as error:  # any compiler error is a result
        row.problem = f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"
        return row
    row.shared, row.seconds = compiled.metadata.shared, round(time.monotonic() - start, 1)
    counts = {short: text.count(spelled) for short, spelled in _SPELLED.items()}
    row.instructions = {short: n for short, n in counts.items() if n}
    row.problem = "; ".join(_problems(row, variant, target))
    return row


def _problems(row: Row, variant: Any, target: Target) -> Iterator[str]:
    if row.shared > target.shared:
        yield f"{row.shared} bytes of shared memory, the device has {target.shared}"
    if row.spills and row.target == "sm_90":
        yield f"spills {row.spills}"
    wanted = variant.expected.get(row.target)
    if wanted and wanted not in (row.instructions or {}):
        yield f"no {wanted}"
    if wanted == "" and row.instructions:
        yield f"unexpected {', '.join(row.instructions)}"


def markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    head = "| kernel | configuration | target | registers | spills | shared | matrix instructions | problem |"
    lines = [head, "|" + "---|" * 8]
    for r in rows:
        counts = " ".join(f"{k} {n}" for k, n in (r.instructions or {}).items())
        cells = (r.name, r.config, r.target, r.registers, r.spills, r.shared, counts, r.problem.replace("\n", " "))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.aot", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for aot.json and aot.md")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all four")
    parser.add_argument("--only", default="", metavar="NAME", help="variants whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the heuristic configurations alone")
    parser.add_argument("--one", action="store_true", help="of every kernel, the first variant alone")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled")
    rows = []
    chosen = list(variants(options.only, options.quick))
    if options.one:
        chosen = list({v.fn: v for v in reversed(chosen)}.values())
    for variant in chosen:
        for name in options.target or TARGETS:
            if not variant.targets or name in variant.targets:
                rows.append(inspect(variant, name))
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
                _write(options.out, rows)
    failed = sum(bool(r.problem) for r in rows)
    print(f"{len(rows)} compiled, {failed} with problems; {options.out / 'aot.md'}")
    return 1 if failed or not rows else 0


def _write(out: Path, rows: list[Row]) -> None:
    """All rows of this Triton, in the order of the variants; those of variants that are no longer shipped are gone."""
    out.mkdir(parents=True, exist_ok=True)
    known = {(row.name, row.config, row.target): row for row in [*_read(out / "aot.json"), *rows]}
    keys = [(v.name, str(v.config), target) for v in variants() for target in v.targets or TARGETS]
    kept = [known[key] for key in keys if key in known]
    content = {"triton": triton.__version__, "rows": [asdict(r) for r in kept]}
    (out / "aot.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "aot.md").write_text(f"Triton {triton.__version__}\n\n{markdown(kept)}", encoding="utf-8")


def _read(path: Path) -> list[Row]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return [Row(**row) for row in content.get("rows", [])] if content.get("triton") == triton.__version__ else []


if __name__ == "__main__":
    sys.exit(main())
