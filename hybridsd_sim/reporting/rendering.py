"""Blocks as HTML and Markdown, and the files of a page.

HTML comes from the templates beside this module: `page.html` for the whole page, `blocks.html` with a macro for each
class of block. They escape whatever is not marked as safe, so that names and reasons from scenarios stay text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from hybridsd_sim.files import write_atomically
from hybridsd_sim.reporting.blocks import ANSWERS, MARKS, SIGNS, Block, Picture

if TYPE_CHECKING:
    from jinja2 import Environment

SHORT_LETTERS = 18
"""Letters of a cell that stays on one line: short figures and intervals do, reasons wrap."""


def write_pages(folder: Path, title: str, blocks: Sequence[Block], shown: Sequence[Picture]) -> Path:
    """Write figures, `report.md` and `index.html` into a folder; returns the page."""
    for picture in shown:
        head = '<?xml version="1.0" encoding="utf-8"?>\n'
        write_atomically(folder / "figures" / f"{picture.name}.svg", f"{head}{picture.svg}\n".encode())
    style = (files("hybridsd_sim.reporting") / "page.css").read_text(encoding="utf-8")
    page = _environment().get_template("page.html").render(title=title, style=style, blocks=blocks)
    write_atomically(folder / "report.md", to_markdown(blocks).encode())
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


def to_html(blocks: Iterable[Block]) -> Markup:
    """Blocks as HTML, in order."""
    macros = _environment().get_template("blocks.html").module
    return Markup("\n").join(getattr(macros, type(block).__name__.lower())(block) for block in blocks)


def to_markdown(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown, in order; figures are linked under `figures/`."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


@cache
def _environment() -> Environment:
    """The templates, with what they know of blocks; jinja2 is loaded when the first page is written."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("hybridsd_sim.reporting"), autoescape=True, keep_trailing_newline=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    made.globals |= {"ANSWERS": ANSWERS, "MARKS": MARKS, "SIGNS": SIGNS, "to_html": to_html}
    made.filters["linked"] = _linked
    made.tests["short"] = lambda text: 0 < len(text) <= SHORT_LETTERS
    return made


def _linked(text: str) -> Markup:
    """Text with its addresses and arXiv numbers as links."""
    safe = re.sub(r"(https?://[^\s<>()]+[^\s<>().,;:])", r'<a href="\1">\1</a>', str(escape(text)))
    linked = re.sub(r"(arXiv[: ](\d{4}\.\d{4,5}))(?!\d)", r'<a href="https://arxiv.org/abs/\2">\1</a>', safe)
    return Markup(linked)  # noqa: S704 - escaped above
