"""The report's charts as plotly figures, plain data in the end: scatters with a Pareto front, heat map, KL distribution."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# told apart without colour as well: by symbol and by text
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagon", "x", "triangle-down")
# Okabe and Ito's colours, which colour-blind readers tell apart on light and on dark
_COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#b8a100",
    "#8c6bb1",
    "#7f7f7f",
    "#4daf4a",
)
_LAYER = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


@dataclass(frozen=True)
class Point:
    """One method in a scatter. number: its row, which gives it the same symbol and colour in every chart."""

    number: int
    name: str
    x: float
    y: float
    front: bool
    error: float | None = None


def scatter(points: Sequence[Point], x: str, y: str, front: str, *, lower_is_better: bool) -> dict[str, Any]:
    """Methods by cost and merit, the Pareto front as a line. lower_is_better: of y, which is then logarithmic."""
    import plotly.graph_objects as go

    figure = go.Figure()
    on = sorted((point for point in points if point.front), key=lambda point: point.x)
    figure.add_scatter(
        x=[point.x for point in on], y=[point.y for point in on], mode="lines", name=front,
        line={"dash": "dot", "color": "#888888"}, hoverinfo="skip",
    )  # fmt: skip
    for point in points:
        number = point.number
        figure.add_scatter(
            x=[point.x], y=[point.y], mode="markers", name=point.name,
            marker={"size": 13, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "color": _COLOURS[number % len(_COLOURS)]},
            error_y={"type": "data", "array": [point.error], "thickness": 1} if point.error else None,
            hovertemplate=f"%{{fullData.name}}<br>{x}: %{{x:.1f}}<br>{y}: %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **_around(y), xaxis={"title": {"text": x}, "rangemode": "tozero"},
        yaxis={"type": "log", "dtick": "D2"} if lower_is_better else {},
    )  # fmt: skip
    return _plain(figure)


def heat_map(layers: Mapping[str, Mapping[str, Any]], x: str) -> dict[str, Any] | None:
    """Relative errors by layer and module; None for an artifact without any. Shades are of the logarithm."""
    import math

    import plotly.graph_objects as go

    cells: dict[tuple[str, int], float] = {}
    for path, layer in layers.items():
        found = _LAYER.match(path.removesuffix(".weight"))
        if found and layer.get("error"):
            cells[found[2], int(found[1])] = float(layer["error"])
    if not cells:
        return None
    modules = list(dict.fromkeys(module for module, _ in cells))
    numbers = sorted({number for _, number in cells})
    errors = [[cells.get((module, number)) for number in numbers] for module in modules]
    shades = [[None if value is None else math.log10(value) for value in line] for line in errors]
    known = [value for line in shades for value in line if value is not None]
    decades = range(math.floor(min(known)), math.ceil(max(known)) + 1)
    ticks = [decade + math.log10(step) for decade in decades for step in (1, 2, 5)]
    figure = go.Figure(
        go.Heatmap(
            x=numbers, y=modules, z=shades, customdata=errors, colorscale="Viridis", reversescale=True, xgap=1, ygap=1,
            colorbar={"tickvals": ticks, "ticktext": [f"{10.0**tick:.1g}" for tick in ticks], "thickness": 12},
            hovertemplate="%{y}, " + x + " %{x}<br>%{customdata:.5f}<extra></extra>", hoverongaps=False,
        )
    )  # fmt: skip
    figure.update_layout(
        template="none", margin={"l": 10, "r": 10, "t": 10, "b": 50},
        xaxis={"title": {"text": x}, "showgrid": False}, yaxis={"autorange": "reversed", "showgrid": False},
    )  # fmt: skip
    return _plain(figure)


def kl_lines(histograms: Sequence[tuple[int, str, Mapping[str, Any]]], x: str, y: str) -> dict[str, Any] | None:
    """(run's number, its name, histogram of log10 KL) -> one line each, in percent of the tokens."""
    import plotly.graph_objects as go

    if not histograms:
        return None
    figure = go.Figure()
    for number, name, histogram in histograms:
        counts, low, high = histogram["counts"], histogram["low"], histogram["high"]
        width = (high - low) / len(counts)
        total = max(sum(counts), 1)
        figure.add_scatter(
            x=[10 ** (low + (i + 0.5) * width) for i in range(len(counts))],
            y=[100 * count / total for count in counts],
            mode="lines", name=name, meta=number, line={"shape": "spline", "color": _COLOURS[number % len(_COLOURS)]},
            hovertemplate="%{fullData.name}<br>%{x:.3g} nats: %{y:.1f}%<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        **_around(y), yaxis={"rangemode": "tozero"},
        xaxis={"title": {"text": x}, "type": "log", "dtick": 1, "exponentformat": "power", "range": [-5, 1]},
    )  # fmt: skip
    return _plain(figure)


def _around(y: str) -> dict[str, Any]:
    """What is around a chart of lines or points: the vertical axis' title above it, so that it is never cut, and the legend
    at the bottom of all, so that it never lies on the horizontal one's."""
    title = {"text": y, "x": 0, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom",
             "xshift": -40, "yshift": 6, "showarrow": False}  # fmt: skip
    return {
        "template": "none",
        "margin": {"l": 50, "r": 10, "t": 34, "b": 50},
        "annotations": [title],
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xref": "container"},
    }


def _plain(figure: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(figure.to_json())
    return {"data": content["data"], "layout": content["layout"]}
