# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""How the book's pages look: one style a policy, figures with computed captions, answer boxes."""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import json
import re
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text


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
# What tables call the columns of stored results; other names stand as they are.
WORDS = {
    "calibrated_amax": "calibrated amax", "snr_db": "SNR (dB)", "gap": "below the oracle (dB)",
    "loss_db": "loss (dB)", "ms_p20": "20th percentile (ms)", "ms_p80": "80th percentile (ms)",
    "first_db": "first sequence (dB)", "all_db": "all sequences (dB)", "n": "sequences",
    "kl": "KL (nats)", "kl_p999": "KL, 99.9th percentile (nats)", "top1": "other top token (%)",
    "nll": "loss of the text (nats)"
}  # fmt: skip
LEAST_TEXT = 8  # px: below it, a figure scrolls sideways instead of shrinking
MANY_MARKERS = 100  # more than these of one artist are drawn as pixels: as paths they weigh more


def model_label(model_name: str) -> str:
    """A run's ``model_name`` without its remarks, for panels and tables."""
    return re.sub(r"^the embedded ", "", model_name.split(" (")[0].split(",")[0])


def _display(kind: str, text: str) -> None:
    # Imported here: the package also runs where there is no Jupyter.
    from IPython import display

    display.display(getattr(display, kind)(text))


def use_style() -> None:
    """Set the book's matplotlib style; text is kept as text, to be selected and searched."""
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
            "savefig.dpi": 160,
            "svg.hashsalt": "nvfp4",
            "svg.fonttype": "none",
        }
    )


def _plain(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def _region(kind: str, caption: str, content: str) -> str:
    """What may be wider than the page: it scrolls by itself, and the keyboard reaches it."""
    label = html.escape(f"{kind}: {_plain(caption)[:120]}", quote=True)
    return f'<div class="scrolls" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def readable(color) -> str:
    """The colour, darkened until text in it has a contrast of 4.5 on white; near-white stays.

    Relative luminance and contrast as in WCAG 2.1.
    """
    rgb = np.array(to_rgb(color))

    def contrast(rgb: np.ndarray) -> float:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return 1.05 / (float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)

    if rgb.min() < 0.9:  # else it is meant for a dark ground
        while contrast(rgb) < 4.55:
            rgb = rgb * 0.97
    return to_hex(tuple(rgb))


def _pixels_for_crowds(fig: plt.Figure) -> None:
    for ax in fig.axes:
        for line in ax.lines:
            marked = line.get_marker() not in ("", "None", None)
            line.set_rasterized(marked and len(np.asarray(line.get_xdata())) > MANY_MARKERS)
        for points in ax.collections:
            crowd = isinstance(points, PathCollection) and len(np.asarray(points.get_offsets()))
            points.set_rasterized(crowd > MANY_MARKERS)


def _shorter(coordinates: re.Match[str]) -> str:
    """To a tenth of a point, which no screen shows."""
    return re.sub(r"(\d\.\d)\d+", r"\1", " ".join(coordinates[0].split()))


def figure_svg(fig: plt.Figure, alt: str) -> str:
    """The figure as inline SVG; it shrinks with the page until its smallest text has ``LEAST_TEXT``."""
    _pixels_for_crowds(fig)
    for text in fig.findobj(Text):
        text.set_color(readable(text.get_color()))  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    # Ids of clips and markers must differ between the figures of a page.
    with plt.rc_context({"svg.hashsalt": hashlib.sha256(alt.encode()).hexdigest()}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue().decode()
    for unwanted, kept in (
        (r"^.*?(?=<svg)|<metadata>.*?</metadata>", ""),  # the prologue of a file of its own
        (r"<style.*?</style>", ""),  # would hold for the whole page
        (r'(<svg[^>]*?) width="[^"]*"', r"\1"),
        (r'(<svg[^>]*?) height="[^"]*"', r"\1"),
        (r'<g id="[^"]*"', "<g"),  # names that other figures have too
        (r" *font-family: [^;\"]*;?", ""),
        (r">\s+<", "><"),
    ):
        svg = re.sub(unwanted, kept, svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= )(d|x|y|x1|x2|y1|y2)="[^"]*"', _shorter, svg)
    smallest = min(
        map(float, re.findall(r"font(?:-size)?: [^;\"]*?([\d.]+)px", svg)), default=10
    )  # points
    width = fig.get_figwidth() * 96
    least = min(width, width * LEAST_TEXT / (smallest * 96 / 72))
    style = f"width:100%;max-width:{width:.0f}px;min-width:{least:.0f}px"
    label = html.escape(alt, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="{style}"', 1)


def figure_html(fig: plt.Figure, *, caption: str, alt: str) -> str:
    """A figure as SVG with a caption below and alternative text, in HTML; closes it.

    ``caption``: the finding first, then sample size, what the band means, configuration; simple
    HTML. ``alt``: the trend and its key value, plain text.
    """
    drawn = _region("Figure", caption, figure_svg(fig, alt))
    plt.close(fig)
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def show(fig: plt.Figure, *, caption: str, alt: str) -> None:
    """Display ``figure_html``."""
    display_html(figure_html(fig, caption=caption, alt=alt))


def display_html(text: str) -> None:
    """Display HTML as it is."""
    _display("HTML", text)


def answer(text: str, *, title: str = "Answer") -> None:
    """Display the answer box of a page; ``text`` is simple HTML, code may be in backticks.

    What follows ``Scope:`` is set apart from the answer.
    """
    heading = f'<p class="admonition-title">{title}</p>'
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text, colon, scope = text.partition(" Scope: ")
    below = f"<p><small>Scope: {scope}</small></p>" if colon else ""
    _display("HTML", f'<div class="admonition tip">{heading}<p>{text}</p>{below}</div>')


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
    frame, groups = rows_of_groups(in_words(frame))
    body = frame.to_html(float_format=lambda v: number(v, style), border=0, index_names=False,
                         classes="table wrap" if wrap else "table", na_rep="–")  # fmt: skip
    head, rest = body.split("</thead>")
    before, _, after = head.rpartition(
        "<th></th>"
    )  # one header row: the index's name goes into its corner
    head = f"{before}<th>{html.escape(str(frame.index.name or ''))}</th>{after}</thead>"
    first, *rows = rest.split("<tr>")
    span = frame.index.nlevels + len(frame.columns)
    titles = {
        at: f'<tr><th colspan="{span}">{html.escape(str(title))}</th></tr>'
        for at, title in groups.items()
    }
    rest = first + "".join(f"{titles.get(at, '')}<tr>{row}" for at, row in enumerate(rows))
    return _region("Table", caption, head + rest) + f"<p><em>{caption}</em></p>"


def table(frame: pd.DataFrame, *, caption: str, **layout) -> None:
    """Display ``table_html``."""
    display_html(table_html(frame, caption=caption, **layout))


def rows_of_groups(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[int, str]]:
    """The frame with one column of names, so that numbers begin beside it also on a phone.

    Where rows share the first level of the index, it becomes a title above them, by the number of the
    row it stands above; the levels that are left are joined by commas.
    """
    index = frame.index
    if index.nlevels == 1:
        return frame, {}
    first = index.get_level_values(0).astype(str)
    starts = [i for i in range(len(first)) if i == 0 or first[i] != first[i - 1]]
    shared = len(starts) < len(first)
    levels = list(range(shared, index.nlevels))
    names = [str(index.names[level]) for level in levels if index.names[level]]
    joined = [", ".join(str(key[level]) for level in levels) for key in index]
    frame = frame.set_axis(pd.Index(joined, name=", ".join(names)), axis=0)
    return frame, {i: first[i] for i in starts} if shared else {}


def number(value: float, style: str) -> str:
    """A float as text; what rounds to zero has no sign."""
    text = f"{value:{style}}"
    return text.lstrip("-") if not re.search("[1-9a-z]", text) else text


def in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the names of ``WORDS`` spelled out, in its header and its index's names."""
    frame = frame.rename(columns=lambda name: WORDS.get(name, name))
    frame.columns = frame.columns.set_names([None] * frame.columns.nlevels)
    frame.index = frame.index.set_names([WORDS.get(str(name), name) for name in frame.index.names])
    return frame


def problem(question: str, answer: str) -> None:
    """Display a worked problem with its answer folded; simple HTML, code may be in backticks."""
    question, answer = (re.sub(r"`([^`]+)`", r"<code>\1</code>", text) for text in (question, answer))
    summary = f"<summary>{question}</summary>"
    _display("HTML", f'<details class="problem">{summary}<p>{answer}</p></details>')


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
