"""Plots as PNG files that appear whole."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from common.files import written_whole

MAX_TICKS = 12
GRID = {"color": "#dddddd", "linewidth": 0.8}
LIMIT: dict[str, Any] = {"color": "#777777", "linewidth": 1.2, "linestyle": ":"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes.

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
    limit_label: str = "",
    dashed: Collection[str] = (),
    log2_x: bool = False,
    share_y: bool = True,
) -> None:
    """Draw panels side by side, `columns` in a row, with one legend of all names if there are several.

    Up to 12 different x are ticks and have markers. A name has the same colour in all panels; those in `dashed` are
    dashed. `log2_x`: logarithmic x axis. `share_y`: one range of y for all panels.
    """
    ticks = sorted({x for panel in panels for points in panel.lines.values() for x, _ in points})
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns + 1), 3.4 * rows + 1.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flatten()
    for axis, panel in zip(axes[: len(panels)], panels, strict=True):
        axis.set(title=panel.title, xlabel=x_label, yscale=panel.y_scale)
        if log2_x:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_minor_locator(NullLocator())
        if len(ticks) <= MAX_TICKS:
            axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelbottom=True)
        axis.grid(**GRID)
        for name, points in panel.lines.items():
            style = {"color": f"C{names.index(name)}", "linestyle": "--" if name in dashed else "-"}
            axis.plot(*zip(*points, strict=True), marker="o" if len(points) <= MAX_TICKS else "", label=name, **style)
        if panel.limit:
            axis.plot(*zip(*panel.limit, strict=True), label=limit_label, **LIMIT)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns + 1, frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
