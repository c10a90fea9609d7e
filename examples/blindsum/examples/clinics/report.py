"""The demo's report: one self-contained HTML file, plots as inline SVG."""

import base64
import io
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from blindsum.examples.clinics.outcome import WAY_TITLES, WAYS, Outcome
from matplotlib.figure import Figure

_COLOURS = {
    "cloud_only": "#9aa5b1",
    "cloud_finetuned": "#e0a458",
    "edge_only": "#5b8db8",
    "fedavg": "#c06c84",
    "personalised": "#2a9d62",
}
INK = "#7a8794"
"""One grey that is readable on light and on dark."""

STYLE: Any = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "blindsum",
    "legend.frameon": False,
}


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def accuracy_by_site(outcome: Outcome) -> str:
    """Bars of every way at every site, as an <svg> element."""
    figure = Figure(figsize=(9, 3.4))
    axes = figure.subplots()
    ways = [way for way in WAYS if all(way in site.accuracy for site in outcome.sites)]
    width = 0.8 / len(ways)
    for place, way in enumerate(ways):
        axes.bar(
            [index + (place - (len(ways) - 1) / 2) * width for index in range(len(outcome.sites))],
            [100 * site.accuracy[way] for site in outcome.sites],
            width * 0.92,
            color=_COLOURS[way],
            label=WAY_TITLES[way],
        )
    axes.set_xticks(range(len(outcome.sites)), [f"{s.name}\n{s.examples} images" for s in outcome.sites])
    axes.set_ylim(40, 100)
    axes.axhline(50, color=INK, linewidth=0.6, linestyle=":")
    axes.set_ylabel("balanced accuracy, %")
    axes.legend(ncols=len(ways), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return svg(figure)


def _accuracy_over_rounds(outcome: Outcome) -> str:
    figure = Figure(figsize=(4.4, 3))
    axes = figure.subplots()
    by_plan: dict[str, list[float]] = defaultdict(list)
    for item in outcome.round_outcomes:
        clinics = [value for name, value in item.validation.items() if name.startswith("clinic-")]
        if clinics:
            by_plan[item.plan].append(100 * sum(clinics) / len(clinics))
    for plan, values in by_plan.items():
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=_COLOURS.get(plan, INK),
            label=WAY_TITLES.get(plan, plan),
        )
    axes.set_xlabel("round")
    axes.set_ylabel("clinic mean after local steps, validation, %")
    axes.legend()
    return svg(figure)


def _time_by_phase(outcome: Outcome) -> str:
    figure = Figure(figsize=(4.4, 3))
    axes = figure.subplots()
    phases: dict[str, None] = {}
    for item in outcome.round_outcomes:
        phases.update(dict.fromkeys(item.seconds))
    count = max(len(outcome.round_outcomes), 1)
    means = {
        phase: sum(item.seconds.get(phase, 0.0) for item in outcome.round_outcomes) / count
        for phase in phases
    }
    axes.barh(list(means), list(means.values()), color="#5b8db8")
    axes.invert_yaxis()
    axes.set_xlabel("seconds a round (mean)")
    for place, value in enumerate(means.values()):
        axes.annotate(f"{value:.2f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    return svg(figure)


def _bytes_by_round(outcome: Outcome) -> str:
    figure = Figure(figsize=(4.4, 3))
    axes = figure.subplots()
    plain = 4 * outcome.dimension / 1000
    measured = (
        sum(item.bytes_up for item in outcome.round_outcomes) / max(len(outcome.round_outcomes), 1) / 1000
    )
    axes.barh(
        ["float32 in the clear", f"{outcome.scheme}, measured"],
        [plain, measured],
        color=["#9aa5b1", "#2a9d62"],
    )
    axes.set_xlabel("kB up, one member, one round")
    for place, value in enumerate((plain, measured)):
        axes.annotate(f"{value:.1f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    return svg(figure)


def picture(rows: list[list[float]]) -> str:
    """A grey picture as a data URI: each value a pixel."""
    figure = Figure(figsize=(2.4, 2.4), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.imshow(rows, cmap="gray", interpolation="nearest")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(outcome: Outcome, path: Path) -> None:
    """Write the report of a run to `path`."""
    ways = [way for way in WAYS if all(way in site.accuracy for site in outcome.sites)]
    with mpl.rc_context(STYLE):
        page = (
            jinja2.Environment(autoescape=True, trim_blocks=True)
            .from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
            .render(
                o=outcome,
                s=outcome.leak_scan,
                ways=ways,
                titles=WAY_TITLES,
                best={site.name: max(site.accuracy[way] for way in ways) for site in outcome.sites},
                by_site=accuracy_by_site(outcome),
                over_rounds=_accuracy_over_rounds(outcome),
                by_phase=_time_by_phase(outcome),
                by_bytes=_bytes_by_round(outcome),
                update_picture=picture(outcome.leak_scan.update_picture),
                wire_picture=picture(outcome.leak_scan.wire_picture),
            )
        )
    path.write_text(page, encoding="utf-8")
