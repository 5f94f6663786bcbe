"""Line and bar plots, as PNG files that appear whole."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from common.checkpoint import written_whole

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's, told apart
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#333333", "#dddddd"
MAX_TICKS = 16
LIMIT: dict[str, Any] = {"color": "#777777", "linewidth": 1.2, "linestyle": ":"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small plot.

    `lines`: for each name its points (x, y); `limit`: a bound, drawn thin and dotted; `y_scale`: log or linear.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    limit: Sequence[tuple[float, float]] = ()
    y_scale: str = "log"


def save_line_plot(
    panels: Sequence[Panel],
    path: str | Path,
    *,
    title: str,
    x_label: str,
    columns: int,
    y_label: str = "",
    limit_label: str = "",
    dashed: Collection[str] = (),
    log2_x: bool = False,
    share_y: bool = True,
    tick_each: bool = True,
) -> None:
    """Draw panels side by side, `columns` in a row, with common colours and one legend.

    Every x of the data is a tick and has a marker, up to 16 of them; without `tick_each` every point has a marker, and
    ticks are those of the axis. A name keeps its colour and marker in all panels;
    those in `dashed` are drawn so. `log2_x`: each doubling of x takes the same room. `share_y`: one range of y for
    all panels. A legend is drawn only where it tells something: for several names, or a limit.
    """
    ticks = sorted({x for panel in panels for points in panel.lines.values() for x, _ in points})
    few = len(ticks) <= MAX_TICKS
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    styles: dict[str, dict[str, Any]] = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)] if few or not tick_each else "",
            "markersize": 4.5,
            "linewidth": 1.8 if few or not tick_each else 1.2,
            "linestyle": "--" if name in dashed else "-",
        }
        for i, name in enumerate(names)
    }
    rows = -(-len(panels) // columns)
    # a figure with a canvas of its own: pyplot's global state and its choice of a window system stay out of it
    figure = Figure(figsize=(max(6.4, 4.2 * columns + 1), 3.4 * rows + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(panel.title, fontsize=10, color=INK)
        axis.set_yscale(panel.y_scale)
        if log2_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        if few and tick_each:
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(which="major", color=GRID, linewidth=0.8)
        axis.grid(which="minor", axis="y", color=GRID, linewidth=0.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9, labelbottom=True, color=INK)
        for name, points in panel.lines.items():
            axis.plot(*zip(*points, strict=True), **styles[name])
        if panel.limit:
            axis.plot(*zip(*panel.limit, strict=True), **LIMIT)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel(x_label, fontsize=9, color=INK)
    for axis in axes[::columns]:
        axis.set_ylabel(y_label, fontsize=9, color=INK)
    handles = [Line2D([], [], label=name, **styles[name]) for name in names]
    if any(panel.limit for panel in panels):
        handles.append(Line2D([], [], label=limit_label, **LIMIT))
    figure.suptitle(title, fontsize=11, color=INK)
    if len(handles) > 1:
        ncols = min(1 + columns, len(handles))
        figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value from 0, the range it was found in, and a bound on it or None; bars of a `group` share a colour."""

    label: str
    group: str
    value: float
    low: float
    high: float
    limit: float | None = None


def save_bar_plot(
    panels: Mapping[str, Sequence[Bar]], path: str | Path, *, title: str, x_label: str, limit_label: str, columns: int
) -> None:
    """Draw panels of horizontal bars, by title, `columns` in a row, each with its own axis; one legend of groups."""
    groups = list(dict.fromkeys(bar.group for bars in panels.values() for bar in bars))
    rows, most = -(-len(panels) // columns), max((len(bars) for bars in panels.values()), default=1)
    figure = Figure(figsize=(1 + 5.2 * columns, rows * (1 + 0.32 * most) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, bars) in zip(axes, panels.items(), strict=False):
        axis.set_title(name, fontsize=10, color=INK)
        for place, bar in enumerate(bars):
            ends = [[bar.value - bar.low], [bar.high - bar.value]]
            colour = COLOURS[groups.index(bar.group) % len(COLOURS)]
            axis.barh(place, bar.value, xerr=ends, height=0.7, color=colour, error_kw={"ecolor": INK, "capsize": 2})
            axis.text(bar.high, place, f"  {bar.value:.3g}", va="center", fontsize=8, color=INK)
            if bar.limit is not None:
                axis.vlines(bar.limit, place - 0.45, place + 0.45, **LIMIT)
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_xlim(left=0)
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9, color=INK)
        axis.set_xlabel(x_label, fontsize=9, color=INK)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles: list[Any] = [Patch(color=COLOURS[i % len(COLOURS)], label=group) for i, group in enumerate(groups)]
    handles.append(Line2D([], [], label=limit_label, **LIMIT))
    figure.suptitle(title, fontsize=11, color=INK)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
