# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""How the book's pages look: one style a policy, figures with computed captions, answer boxes."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import re
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Style:
    """Colour, marker and line style, the same on every page."""

    label: str
    color: str
    marker: str
    linestyle: str = "-"


# Colours mean policies and nothing else: Okabe and Ito's, and where those end, Tol's.
POLICY_STYLE = {
    "amax": Style("amax", "#0072B2", "o"),
    "p99": Style("p99", "#882255", "v", ":"),
    "p99.9": Style("p99.9", "#E69F00", "^", ":"),
    "p99.99": Style("p99.99", "#D55E00", "<", "--"),
    "p99.999": Style("p99.999", "#CC79A7", ">", "--"),
    "headroom": Style("headroom", "#009E73", "s"),
    "headroom-amax": Style("headroom, at least amax", "#44AA99", "s", "--"),
    "raised": Style("raised amax", "#AA3377", "H"),
    "raised-all": Style("raised amax, all the room", "#EE99AA", "H", "--"),
    "constant": Style("constant", "#56B4E9", "D", "-."),
    "aligned": Style("aligned headroom", "#117733", "p", "--"),
    "mse": Style("mse", "#332288", "h"),
    "dynamic": Style("dynamic", "#999999", "P", "-."),
    "four-over-six": Style("four-over-six", "#8B4513", "X"),
    "oracle": Style("oracle", "#000000", "*"),
}
UNDERFLOW_STYLE = {
    "flush": Style("flush (kernels)", "#000000", "o"),
    "floor": Style("floor (reference)", "#777777", "s", "--"),
}
KIND_STYLE = {
    "attention_input": Style("attention_input", "#000000", "o"),
    "o_proj_input": Style("o_proj_input", "#444444", "^", "--"),
    "mlp_input": Style("mlp_input", "#707070", "s", "-."),
    "down_proj_input": Style("down_proj_input", "#949494", "D", ":"),
}
KIND_COLORS = {kind: style.color for kind, style in KIND_STYLE.items()}
OTHER_KIND = Style("other", "#b0b0b0", "x")  # of a site that is named by a pattern
REGIME_COLORS = {"saturated": "#f6d5c3", "normal": "#ffffff", "subnormal": "#dbe9f4",
                 "underflow": "#d9d9d9"}  # fmt: skip


def model_label(model_name: str) -> str:
    """A run's ``model_name`` without its remarks, for panels and tables."""
    return re.sub(r"^the embedded ", "", model_name.split(" (")[0].split(",")[0])


def _display(kind: str, text: str) -> None:
    # Imported here: the package also runs where there is no Jupyter.
    from IPython import display

    display.display(getattr(display, kind)(text))


def use_style() -> None:
    """Set the book's matplotlib style; deterministic SVG ids, text drawn as paths."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.2, 4.0),
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "svg.hashsalt": "nvfp4",
            "svg.fonttype": "path",
        }
    )


def figure_html(fig: plt.Figure, *, caption: str, alt: str) -> str:
    """A figure as SVG with a caption below and alternative text, in HTML; closes it.

    ``caption``: the finding first, then sample size, what the band means, configuration; simple
    HTML. ``alt``: the trend and its key value, plain text.
    """
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(fig)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(alt, quote=True)}" style="max-width:100%" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def show(fig: plt.Figure, *, caption: str, alt: str) -> None:
    """Display ``figure_html``."""
    display_html(figure_html(fig, caption=caption, alt=alt))


def display_html(text: str) -> None:
    """Display HTML as it is."""
    _display("HTML", text)


def answer(text: str, *, title: str = "Answer") -> None:
    """Display the answer box of a page; ``text`` is simple HTML, code may be in backticks."""
    heading = f'<p class="admonition-title">{title}</p>'
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    _display("HTML", f'<div class="admonition tip">{heading}<p>{text}</p></div>')


def prose(text: str) -> None:
    """Display Markdown whose numbers were computed."""
    _display("Markdown", text)


def table_html(
    frame: pd.DataFrame, *, caption: str, digits: int = 2, significant: bool = False, wrap: bool = False
) -> str:
    """A table with a caption, in HTML; floats to ``digits`` decimals, or significant digits.

    ``wrap``: cells hold sentences, which may take several lines.
    """
    style = f".{digits}{'g' if significant else 'f'}"
    classes = "table wrap" if wrap else "table"
    body = frame.to_html(float_format=lambda v: f"{v:{style}}", border=0, classes=classes, na_rep="–")
    return f'<div style="overflow-x:auto">{body}</div><p><em>{caption}</em></p>'


def table(frame: pd.DataFrame, *, caption: str, **layout) -> None:
    """Display ``table_html``."""
    display_html(table_html(frame, caption=caption, **layout))


def provenance(info: dict) -> None:
    """Display where a page's stored results come from, folded."""
    text = html.escape(json.dumps(info, indent=1, ensure_ascii=False))
    summary = "<summary>Provenance of these results</summary>"
    _display("HTML", f"<details>{summary}<pre>{text}</pre></details>")


def label_lines(ax: plt.Axes, *, pad: float = 4) -> None:
    """Write each labelled line's name at its right end, in its colour, spread so none overlap."""
    ends = []
    for line in ax.get_lines():
        if not str(line.get_label()).startswith("_"):
            x, y = np.asarray(line.get_xydata())[-1]
            ends.append([ax.transData.transform((x, y))[1], x, y, line])
    ends.sort(key=lambda e: e[0])
    gap = 1.15 * plt.rcParams["font.size"] * ax.figure.dpi / 72
    for below, this in itertools.pairwise(ends):
        this[0] = max(this[0], below[0] + gap)
    for pixel, x, y, line in ends:
        shift = (pixel - ax.transData.transform((x, y))[1]) * 72 / ax.figure.dpi
        ax.annotate(line.get_label(), (x, y), xytext=(pad, shift), textcoords="offset points",
                    color=line.get_color(), va="center", fontsize=9, annotation_clip=False)  # fmt: skip


def kind_style(kind: str) -> Style:
    """The style of a kind of site, also of one that is named by a pattern."""
    return KIND_STYLE.get(kind, replace(OTHER_KIND, label=kind))


def policy_line(ax: plt.Axes, policy: str, x, y, **kwargs):
    """Plot a line in the policy's own colour, marker and dash."""
    style = POLICY_STYLE[policy]
    return ax.plot(x, y, color=style.color, marker=style.marker, linestyle=style.linestyle,
                   label=style.label, markersize=5, **kwargs)  # fmt: skip
