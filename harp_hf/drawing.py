"""How every figure of the report is made: one style, an SVG for a light or dark page, a PNG, a text alternative.

A figure is as wide as a phone; wider pages set several beside each other. Colours run from purple (harm) over nearly
white (none) to orange (help), which colour-blind readers tell apart; a mark or a number says the same again.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import matplotlib.font_manager
from matplotlib.figure import Figure as Canvas

WIDTH = 3.8
# Stands for the page's own colour of text, which replaces it in every SVG.
INK = "#1b1d20"
HELPS, HARMS, PLAIN = "#d0741a", "#8a7bbd", "#3f8f8a"
# Longest name beside an axis, in letters.
LABEL = 18

_STYLE = {
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "hatch.linewidth": 0.7,
    "legend.frameon": False, "legend.fontsize": 8, "font.family": "DejaVu Sans", "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "harp_hf", "axes.unicode_minus": True,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        name: File name of the PNG without its ending.
        title: What it is about, where several figures show the same; may be empty.
        caption: What it shows and how to read it.
        alt: What can be seen in it, in numbers.
        svg: Transparent, text in the colour of the page around it.
        png: On white.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes


def draw(
    name: str, caption: str, alt: str, height: float, paint: Callable[[Canvas], object], title: str = ""
) -> Figure:
    """Make a figure of `height` inches with `paint`; the same input gives the same bytes."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names of tasks may hold signs that matplotlib's font lacks; the browser's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type, unused-ignore]
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        paint(canvas)
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        if not _name_emoji(canvas):
            canvas.set_layout_engine("none")
        canvas.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return Figure(name, title, caption, alt, _inline(svg.getvalue(), name), png.getvalue())


def _name_emoji(canvas: Canvas) -> bool:
    """Put the names of emoji in their place beside the axes, for a PNG has only matplotlib's font."""
    known = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans")).get_charmap()

    def named(sign: str) -> str:
        if ord(sign) in known or unicodedata.category(sign) not in ("So", "Cf", "Mn"):
            return sign
        return unicodedata.name(sign, "").lower() if unicodedata.category(sign) == "So" else ""

    found = False
    for axis in (axis for axes in canvas.axes for axis in (axes.xaxis, axes.yaxis)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        plain = ["".join(map(named, label)) for label in labels]
        if plain != labels:
            axis.set_ticklabels(plain)
            found = True
    return found


def _inline(svg: str, name: str) -> str:
    """An SVG that can stand in a page beside others, and takes its colour of text from there."""
    body = svg[svg.index("<svg") :]
    for part in ("metadata", "style"):
        body = re.sub(rf"<{part}\b.*?</{part}>", "", body, count=1, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    rest = re.sub(r"<[^<>]+>", lambda tag: _own(tag.group(), name), rest)
    return f'<svg aria-hidden="true" focusable="false" {box.group() if box else ""}>{rest.strip()}'


def _own(tag: str, name: str) -> str:
    """A tag whose ids are no other figure's; what is between tags, such as names of tasks, is left alone."""
    tag = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", tag)
    return tag.replace(INK, "currentColor")


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def count_leaves(count: int) -> str:
    """So many leaves, in words."""
    return f"{count:,} {'leaf' if count == 1 else 'leaves'}"


def short(text: str) -> str:
    """A name that fits beside an axis."""
    text = " ".join(text.split())
    return text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"
