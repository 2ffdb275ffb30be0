"""The demo's pictures, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from tdeconv.demo.train import Run, by_line
from tdeconv.demo.whitening import Density, PatchWhitening, PixelDeconvolution

INK, FAINT = "#222222", "#767676"
ORANGE, BLUE = "#d9720b", "#1c63c4"
LINES = (ORANGE, BLUE, "#12876f", "#8b3fae", "#a8263b", "#6b6b1f")  # batch norm's, then deconvolution's
BEFORE, AFTER = "#8a8a8a", BLUE
RGB = {"R": "#d02f2f", "G": "#2a8f3c", "B": "#2b5fd0"}
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def _png(size: tuple[float, float], title: str, draw: Callable[[Any], None]) -> bytes:
    """Draw on a new figure of ``size`` inches: no window, no global state."""
    with mpl.rc_context(STYLE):
        figure = Figure(size, dpi=130, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _picture(axes: Any, image: Tensor, title: str = "", **options: Any) -> Any:
    shown = axes.imshow(image.numpy(), interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[], title=title)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return shown


# training ------------------------------------------------------------------------------------------------------------


def training(runs: Sequence[Run], dataset: str, arch: str) -> bytes:
    """Loss and accuracy against epochs and against training time, every seed and their mean (the paper's Fig. 12)."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, 2, sharey="row")
        lines = by_line(runs)
        for (line, of_line), colour in zip(lines.items(), cycle(LINES), strict=False):
            _curves(panels, of_line, colour, line.title)
        for column, label in enumerate(("epochs", "training time in seconds, evaluation excluded")):
            panels[0, column].set(yscale="log")
            panels[0, column].yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            panels[0, column].yaxis.set_minor_formatter("")
            panels[1, column].set(xlabel=label)
        for axes in panels[:, 0]:
            axes.set_xlim(left=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[:, 1]:
            axes.set_xlim(left=0)
        panels[0, 0].set(ylabel="training loss (cross-entropy)")
        panels[1, 0].set(ylabel="test accuracy, %")
        panels[0, 1].legend(loc="upper right")
        figure.align_ylabels(panels[:, 0])
        if len(runs) > len(lines):
            panels[0, 0].set_title("thick: mean of the seeds; thin: each seed", fontsize=9, color=FAINT)

    return _png((10, 7), f"Network '{arch}' on {dataset}: the same data, seeds and schedule", draw)


def _curves(panels: Any, runs: list[Run], colour: str, title: str) -> None:
    """One line's four curves: thin for each seed, thick for the mean over seeds."""
    steps = len(runs[0].step_loss)
    window = max(1, steps // 30)
    keep = steps // window * window
    loss, seconds = (
        np.array([getattr(run, name)[:keep] for run in runs]).reshape(len(runs), -1, window).mean(2)
        for name in ("step_loss", "step_seconds")
    )
    passed = (np.arange(loss.shape[1]) + 0.5) * window * len(runs[0].epochs) / steps
    accuracy, elapsed = (
        np.array([[getattr(epoch, name) for epoch in run.epochs] for run in runs])
        for name in ("test_accuracy", "seconds")
    )
    epochs = np.arange(1, accuracy.shape[1] + 1)
    for row, values, times, counts, marker in (
        (0, loss, seconds, passed, ""),
        (1, 100 * accuracy, elapsed, epochs, "o"),
    ):
        for axes, xs in ((panels[row, 0], np.broadcast_to(counts, values.shape)), (panels[row, 1], times)):
            if len(runs) > 1:
                axes.plot(xs.T, values.T, color=colour, alpha=0.3, linewidth=1)
            axes.plot(xs.mean(0), values.mean(0), color=colour, linewidth=2.4, marker=marker, markersize=5, label=title)


# patches -------------------------------------------------------------------------------------------------------------


def covariance(whitening: PatchWhitening, dataset: str) -> bytes:
    """The patches' covariance before and after, the matrix between, and their spectra (the paper's Fig. 3)."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.15))
        figure.get_layout_engine().set(wspace=0.06)
        images = (
            (whitening.cov, "Covariance of the patches"),
            (whitening.deconv, f"Deconvolution matrix ({whitening.n_iter} steps)"),
            (whitening.whitened, "Covariance after deconvolution"),
        )
        for axes, (matrix, title) in zip(panels, images, strict=False):
            reach = float(matrix.abs().max())
            shown = _picture(axes, matrix, title, cmap="RdBu_r", vmin=-reach, vmax=reach)
            figure.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.8, pad=0.02)
            _channel_marks(axes, whitening.channels, len(matrix))
        _spectra(panels[3], whitening)

    return _png((14, 4.6), f"3x3 patches of {dataset} before and after deconvolution", draw)


def _channel_marks(axes: Any, channels: int, size: int) -> None:
    """Lines between the channels' blocks of a patch's covariance, and their names."""
    taps = size // channels
    for k in range(1, channels):
        axes.axhline(k * taps - 0.5, color="white", linewidth=1)
        axes.axvline(k * taps - 0.5, color="white", linewidth=1)
    if channels == 3:
        places = [(k + 0.5) * taps - 0.5 for k in range(3)]
        axes.set_xticks(places, list(RGB))
        axes.set_yticks(places, list(RGB))
        axes.tick_params(length=0)


def _spectra(axes: Any, whitening: PatchWhitening) -> None:
    curves = (
        (whitening.cov, "before", BEFORE, "-"),
        (whitening.few, f"after, {whitening.few_steps} steps", AFTER, "--"),
        (whitening.whitened, f"after, {whitening.n_iter} steps", AFTER, "-"),
    )
    for matrix, label, colour, line in curves:
        values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=1e-12)
        axes.plot(range(1, len(values) + 1), values.numpy(), line, color=colour, linewidth=2, label=label)
    low, high = (float(value) for value in torch.linalg.eigvalsh(whitening.cov).clamp(min=1e-12)[[0, -1]].log10())
    axes.set(yscale="log", xlabel="eigenvalue, largest first", title="Eigenvalues of the covariance")
    axes.set_ylim(10 ** min(-1.0, math.floor(low)), 10 ** max(1.0, math.ceil(high)))
    axes.legend(loc="lower left")


# photographs ---------------------------------------------------------------------------------------------------------


def kernels(deconvolution: PixelDeconvolution) -> bytes:
    """The deconvolution kernels of R, G and B, on- and off-centre (the paper's Fig. 2 and 9)."""
    filters = deconvolution.kernels
    size = filters.shape[-1]

    def draw(figure: Any) -> None:
        panels = figure.subplots(3, 4, width_ratios=(1, 1, 1.15, 1.7))
        for row, (name, colour) in enumerate(RGB.items()):
            reach = float(filters[row].abs().max()) / 5
            colours = (0.5 + 0.5 * filters[row] / reach).clamp(0, 1).permute(1, 2, 0)
            _picture(panels[row, 0], colours)
            _picture(panels[row, 1], 1 - colours)
            shown = _picture(panels[row, 2], filters[row, row], cmap="RdBu_r", vmin=-reach, vmax=reach)
            figure.colorbar(shown, ax=panels[row, 2], shrink=0.85, extend="max")
            panels[row, 0].set_ylabel(name, rotation=0, fontsize=16, fontweight="bold", color=colour, labelpad=14)
            panels[row, 0].yaxis.label.set_verticalalignment("center")
            _profile(panels[row, 3], filters[row])
        for column, title in enumerate(("on-centre*", "off-centre (negated)*", "weights on its own channel*", "")):
            panels[0, column].set_title(title)
        panels[0, 3].set_title("weights along the row through the centre")
        panels[2, 3].set_xlabel("pixels from the centre")
        note = "* zero is grey (maps: white); colours saturate at a fifth of the centre's weight, to show the surround"
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=FAINT)

    title = f"{size}x{size} deconvolution kernels of R, G, B from photographs: centre and surround"
    return _png((12.5, 8.6), title, draw)


def _profile(axes: Any, kernel: Tensor) -> None:
    size = kernel.shape[-1]
    offsets = np.arange(size) - size // 2
    for weights, (name, colour) in zip(kernel, RGB.items(), strict=True):
        axes.plot(offsets, weights[size // 2].numpy(), color=colour, linewidth=2, marker=".", label=f"on {name}")
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.legend(loc="upper right")


def photographs(pictures: Sequence[Tensor], deconvolution: PixelDeconvolution) -> bytes:
    """Photographs before and after deconvolution (the paper's Fig. 4); pictures ``(3, H, W)`` in [0, 1]."""
    margin = deconvolution.kernels.shape[-1] // 2

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, len(pictures), squeeze=False)
        for column, picture in enumerate(pictures):
            before = picture[:, margin:-margin, margin:-margin]
            after = deconvolution(picture)
            shown = (0.5 + (after - after.mean()) / (6 * after.std())).clamp(0, 1)
            _picture(panels[0, column], before.permute(1, 2, 0), "before" if column == 0 else "")
            _picture(panels[1, column], shown.permute(1, 2, 0), "after deconvolution" if column == 0 else "")

    size = deconvolution.kernels.shape[-1]
    title = f"Photographs before and after deconvolution ({size}x{size} patches of R, G, B)"
    return _png((4.2 * len(pictures), 6.3), title, draw)


def densities(before: Density, after: Density) -> bytes:
    """Histogram and log density of the values before and after (the paper's Fig. 10)."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        places = before.centres.numpy()
        for curve, name, colour in ((before, "before", BEFORE), (after, "after", AFTER)):
            height = curve.height.numpy()
            label = f"{name}: excess kurtosis {curve.kurtosis:.1f}".replace("-", "\N{MINUS SIGN}")
            left.fill_between(places, height, step="mid", color=colour, alpha=0.35)
            left.step(places, height, where="mid", color=colour, linewidth=1.6, label=label)
            right.semilogy(places, np.where(height > 0, height, np.nan), color=colour, linewidth=2, label=name)
        normal = np.exp(-(places**2) / 2) / np.sqrt(2 * np.pi)
        right.semilogy(places, normal, ":", color=INK, linewidth=1.3, label="normal distribution")
        top = 1.25 * float(max(before.height.max(), after.height.max()))
        left.set(title="Histogram: most values become nearly zero", xlim=(-4, 4), ylim=(0, top), ylabel="density")
        right.set(title="Log density: and a few large", xlim=(-10, 10), ylim=(1e-6, 3), ylabel="density (log scale)")
        right.set_xticks(range(-10, 11, 5))
        for axes in (left, right):
            axes.set_xlabel("value (colour channel of a pixel), in standard deviations")
            axes.legend(loc="upper right")

    return _png((11, 4.6), "Values of the photographs' pixels before and after deconvolution", draw)
