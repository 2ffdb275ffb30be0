"""What an installed wheel must do, run by .ci/run outside the source tree: ``python -I smoke.py SOURCE_TREE``."""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import tdeconv
import tdeconv.kernels


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"smoke test: {what}")


def installed_alone(tree: Path) -> None:
    """Everything comes from the wheel, and nothing is called `kernels` at the top level."""
    for module in (tdeconv, tdeconv.kernels):
        path = Path(str(module.__file__)).resolve()
        check(tree not in path.parents or "site-packages" in path.parts, f"{module.__name__} is {path}, in the tree")
    check(tdeconv.kernels.__name__ == "tdeconv.kernels", f"tdeconv.kernels calls itself {tdeconv.kernels.__name__}")
    check(importlib.util.find_spec("kernels") is None, "a top-level module `kernels` was installed")
    check(tdeconv.__version__ == version("tdeconv"), f"version {tdeconv.__version__} is not the package's")


def layer_learns() -> None:
    """One step of training moves weight and statistics; evaluation is a convolution with the folded weight."""
    torch.manual_seed(0)
    layer = tdeconv.FastDeconv(3, 8, 3, padding=1)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 3, 16, 16)
    weight = layer.weight.detach().clone()
    layer(x).square().mean().backward()
    optimiser.step()
    check(bool(layer.weight.isfinite().all()) and not torch.equal(layer.weight, weight), "the step moved no weight")
    check(not torch.equal(layer.running_deconv, torch.eye(27)), "training left the running statistics alone")

    layer.eval()
    folded = tdeconv.fold_deconv(layer.weight, layer.bias, layer.running_mean, layer.running_deconv)
    torch.testing.assert_close(layer(x), torch.nn.functional.conv2d(x, *folded, padding=1), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    installed_alone(Path(sys.argv[1]).resolve())
    layer_learns()
    print(f"tdeconv {tdeconv.__version__} on torch {torch.__version__}: the wheel works")
