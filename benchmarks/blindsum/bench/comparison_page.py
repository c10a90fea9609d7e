"""The comparison as one self-contained HTML file: tables, and plots as inline SVG."""

import io
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

_COLOURS = {
    "plaintext": "#9aa5b1",
    "masking": "#2a9d62",
    "bfv": "#5b8db8",
    "ckks": "#e0a458",
    "paillier": "#c06c84",
}
_INK = "#7a8794"
"""One grey that is readable on light and on dark."""

_STYLE: Any = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "blindsum",
    "legend.frameon": False,
}


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _by_size(figures: dict[str, Any], key: str, label: str, *, per_param: bool = False) -> str:
    """A line for each scheme over the model's size; what was scaled up is dotted."""
    figure = Figure(figsize=(4.6, 3.2))
    axes = figure.subplots()
    for name, colour in _COLOURS.items():
        entries = [one for one in figures["results"] if one["scheme"] == name]
        values = [one[key] * (one["dim"] if per_param else 1) for one in entries]
        sizes = [one["dim"] for one in entries]
        known = sum(not one["estimated"] for one in entries)
        axes.plot(sizes[:known], values[:known], color=colour, marker="o", markersize=3, label=name)
        first = max(known - 1, 0)
        axes.plot(sizes[first:], values[first:], color=colour, linestyle=":", marker="o", markersize=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel(label)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.22))
    return _svg(figure)


def _round_times(figures: dict[str, Any], size: int) -> str:
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    entries = {one["scheme"]: one for one in figures["results"] if one["dim"] == size}
    width = 0.8 / len(entries)
    bandwidths = figures["bandwidths_mbit_per_s"]
    for place, (name, entry) in enumerate(entries.items()):
        axes.bar(
            [index + (place - (len(entries) - 1) / 2) * width for index in range(len(bandwidths))],
            [entry["round_s"][f"{one:g}"] for one in bandwidths],
            width * 0.92,
            color=_COLOURS[name],
            label=name + (" (scaled up)" if entry["estimated"] else ""),
        )
    axes.set_xticks(range(len(bandwidths)), [f"{one:g} Mbit/s" for one in bandwidths])
    axes.set_yscale("log")
    axes.set_ylabel(f"seconds a round, {size:,} parameters")
    axes.legend(ncols=len(entries), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return _svg(figure)


def write_page(figures: dict[str, Any], path: Path, command: str) -> None:
    """Write the page; `command` is what made it."""
    with mpl.rc_context(_STYLE):
        page = (
            jinja2.Environment(autoescape=True, trim_blocks=True)
            .from_string(files(__package__).joinpath("comparison.html.jinja").read_text(encoding="utf-8"))
            .render(
                f=figures,
                command=command,
                up=_by_size(figures, "bytes_up_per_param", "bytes up, one member", per_param=True),
                member=_by_size(figures, "member_cpu_s", "member CPU, s"),
                server=_by_size(figures, "aggregator_cpu_s", f"server CPU, s, {figures['members']} members"),
                opening=_by_size(figures, "member_open_cpu_s", "opening the sum, CPU s"),
                rounds=[_round_times(figures, size) for size in figures["sizes"]],
            )
        )
    path.write_text(page, encoding="utf-8")
