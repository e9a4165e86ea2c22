"""The figure of `vcache bench transfer`: moving KV directly between VRAM against the ways through host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError


class Curve(NamedTuple):
    """GB/s over size. `points`: (bytes, median, low, high) by rising size."""

    label: str
    points: Sequence[tuple[int, float, float, float]]
    group: str
    """`direct`, `dram` or `reference`: decides colour and stroke."""


_COLOURS: Mapping[str, Sequence[str]] = {
    "direct": ("#1b6ca8", "#3fa34d", "#0d3b66", "#6a4c93"),
    "dram": ("#d1495b", "#edae49", "#8d5524", "#a23b72"),
    "reference": ("#555555", "#999999"),
}
_STROKES = {"direct": "-", "dram": "--", "reference": ":"}


def draw(curves: Sequence[Curve], path: Path, *, title: str) -> None:
    """Write a log-log figure to `path` (format by its suffix). Raises `ConfigError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib; install vcache[plot], or leave --plot out") from None
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes: Any = figure.subplots()
    used: dict[str, int] = {}
    for curve in curves:
        palette = _COLOURS[curve.group]
        colour = palette[used.get(curve.group, 0) % len(palette)]
        used[curve.group] = used.get(curve.group, 0) + 1
        sizes = [point[0] for point in curve.points]
        axes.plot(
            sizes,
            [point[1] for point in curve.points],
            _STROKES[curve.group],
            color=colour,
            label=curve.label,
            marker="o",
            markersize=3.5,
            linewidth=1.8,
        )
        axes.fill_between(
            sizes,
            [point[2] for point in curve.points],
            [point[3] for point in curve.points],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({point[0] for curve in curves for point in curve.points})
    axes.set_xticks(ticks, [size_text(size) for size in ticks], rotation=45, ha="right")
    axes.minorticks_off()
    axes.set_xlabel("KV moved in one request")
    axes.set_ylabel("GB/s (median; band: fastest to slowest)")
    axes.set_title(title, fontsize=11)
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=160)


class Bar(NamedTuple):
    """One way, over several cases. `values`: (median, low, high) by case; None where it was not measured."""

    label: str
    values: Sequence[tuple[float, float, float] | None]
    group: str
    """As `Curve.group`."""


def draw_bars(cases: Sequence[str], bars: Sequence[Bar], path: Path, *, title: str, unit: str) -> None:
    """Write horizontal bars on a logarithmic axis to `path`, a panel for each case. Raises `ConfigError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError:
        raise ConfigError("a plot needs matplotlib; install vcache[plot]") from None
    figure = Figure(figsize=(3.1 * len(cases) + 2.2, 0.34 * len(bars) + 1.4), layout="constrained")
    panels: Any = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for case, (name, axes) in enumerate(zip(cases, panels, strict=True)):
        used: dict[str, int] = {}
        for place, bar in enumerate(bars):
            palette = _COLOURS[bar.group]
            colour = palette[used.get(bar.group, 0) % len(palette)]
            used[bar.group] = used.get(bar.group, 0) + 1
            value = bar.values[case]
            if value is None:
                continue
            median, low, high = value
            axes.barh(place, median, color=colour, height=0.7, xerr=[[median - low], [high - median]], error_kw={"lw": 0.8})
            axes.annotate(f" {median:,.0f}", (high, place), va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(unit, fontsize=9)
        axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8.5)
        axes.margins(x=0.25)
        # From one power of ten on: labels at these are then enough.
        lowest = min((bar.values[case][1] for bar in bars if bar.values[case] is not None), default=1.0)  # type: ignore[index]
        axes.set_xlim(left=10.0 ** floor(log10(lowest)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=160)


def size_text(nbytes: int) -> str:
    """`64 MiB`, `2 GiB`, `512 KiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            value = nbytes / factor
            return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
    return f"{nbytes} B"
