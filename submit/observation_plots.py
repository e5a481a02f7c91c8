"""Plots of `defense/observations.py`, drawn without a display and written as PNG."""
from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from data.files import write_atomic
from defense.observations import correlation, joined

SIZE, DPI = (5.5, 4.0), 110  # inches; dots an inch


def weight_change_plot(clean: Mapping[str, Tensor], poison: Mapping[str, Tensor]) -> Figure:
    """Each neuron's weight change under clean (across) and poison (up) unlearning, a colour a layer, Pearson's r."""
    figure, axes = _axes("NWC, clean unlearning", "NWC, poison unlearning")
    names = list(clean)
    shades = [i for i, name in enumerate(names) for _ in clean[name]]
    dots = axes.scatter(joined(clean).numpy(), joined(poison).numpy(), c=shades, s=8, cmap="viridis")
    bar = figure.colorbar(dots, ax=axes, ticks=[0, len(names) - 1])
    bar.ax.set_yticklabels([names[0], names[-1]], fontsize=7)
    axes.set_title(f"{len(shades)} neurons, r = {correlation(joined(clean), joined(poison)):.2f}")
    return figure


def neurons_plot(values: Mapping[str, Tensor], what: str) -> Figure:
    """Any value of every neuron (activeness, TAC): within each layer sorted, the layers side by side."""
    figure, axes = _axes("neurons, by layer and falling", what)
    place = 0
    for i, part in enumerate(values.values()):
        axes.bar(range(place, place + len(part)), part.sort(descending=True).values.numpy(), width=1.0,
                 color=("tab:blue", "tab:orange")[i % 2])
        place += len(part)
    axes.set_title(f"{what}: {place} neurons of {len(values)} layers")
    return figure


def coverage_plot(found: Mapping[str, Tensor], shares: Sequence[float]) -> Figure:
    """Coverage of the top neurons by TAC, a line a ranking, with that of a random order."""
    figure, axes = _axes("share of the neurons", "coverage of the top ones by TAC")
    for name, values in found.items():
        axes.plot(list(shares), values.numpy(), marker="o", markersize=3, label=name)
    axes.plot(list(shares), list(shares), "k:", label="random order")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return figure


def _axes(across: str, up: str) -> tuple:
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return figure, axes


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure to `path`: all of it or nothing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
