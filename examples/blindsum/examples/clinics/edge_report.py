"""The report of `blindsum demo edge`: one self-contained HTML file, pictures inline."""

from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np
from blindsum.examples.clinics.edge_outcome import EdgeOutcome
from blindsum.examples.clinics.outcome import WAY_TITLES, WAYS
from blindsum.examples.clinics.report import INK, STYLE, accuracy_by_site, picture, svg
from blindsum.examples.clinics.sites import CLINICS
from matplotlib.figure import Figure

_PICTURES = 4


def _cascade(outcome: EdgeOutcome) -> str:
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    for one in outcome.inference.deployments:
        shares, found = zip(*one.curve, strict=True)
        axes.plot(
            [100 * share for share in shares],
            [100 * value for value in found],
            label=f"{one.edge_model} at {one.site}: {'asks' if one.helps else 'switched off by itself'}",
        )
        axes.plot([100 * one.share_sent], [100 * one.cascade], marker="o", color=axes.lines[-1].get_color())
    axes.set_xlabel("share of the images sent, least sure first, %")
    axes.set_ylabel("balanced accuracy, %")
    axes.legend()
    return svg(figure)


def _hard(outcome: EdgeOutcome) -> str:
    figure = Figure(figsize=(8.4, 3))
    axes = figure.subplots()
    hard = outcome.hard
    for place, (name, values, colour) in enumerate(
        (("before", hard.before, "#9aa5b1"), ("after", hard.after, "#2a9d62"))
    ):
        axes.bar(
            [index + (place - 0.5) * 0.38 for index in range(len(CLINICS))],
            [100 * values[clinic] for clinic in CLINICS],
            0.36,
            color=colour,
            label=f"the hospital's model, {name}",
        )
    axes.set_xticks(
        range(len(CLINICS)), [f"{clinic}\n{hard.forwarded.get(clinic, 0)} forwarded" for clinic in CLINICS]
    )
    axes.set_ylim(40, 100)
    axes.axhline(50, color=INK, linewidth=0.6, linestyle=":")
    axes.set_ylabel("balanced accuracy, %")
    axes.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.18))
    return svg(figure)


def _rebuilt(outcome: EdgeOutcome) -> list[dict[str, str]]:
    found = outcome.inference.inversion
    return [
        {
            name: picture(np.asarray(images[index], dtype=np.float64).reshape(28, 28).tolist())
            for name, images in (
                ("image", found.images),
                ("clear", found.from_clear),
                ("encrypted", found.from_encrypted),
            )
        }
        for index in range(min(_PICTURES, len(found.images)))
    ]


def write_edge_report(outcome: EdgeOutcome, path: Path) -> None:
    """Write the report of a run to `path`."""
    ways = [way for way in WAYS if outcome.clinics.has(way)]
    with mpl.rc_context(STYLE):
        page = (
            jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
            .from_string(files(__package__).joinpath("edge_report.html.jinja").read_text(encoding="utf-8"))
            .render(
                o=outcome,
                ways=ways,
                titles=WAY_TITLES,
                by_site=accuracy_by_site(outcome.clinics),
                cascade=_cascade(outcome),
                hard=_hard(outcome),
                rebuilt=_rebuilt(outcome),
            )
        )
    path.write_text(page, encoding="utf-8")
