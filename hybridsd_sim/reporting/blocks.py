"""What pages are made of, each written as HTML and as Markdown: the same blocks, two ways of writing them.

A `Cell` is what a table shows at one place: text, smaller lines beneath, and a mark (measured, quoted or modelled; yes
or no) that never speaks by colour alone. A kind has one shape everywhere, in figures too. What nobody knows is an em
dash with its reason beneath.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Protocol

from hybridsd_sim.estimate import DASH, Show, number
from hybridsd_sim.files import write_atomically
from hybridsd_sim.reporting.labels import Data, beneath, reach


def write_pages(folder: Path, title: str, blocks: Sequence[Any], shown: Sequence[Any]) -> Path:
    """Write figures, `report.md` and `index.html` into a folder; returns the page."""
    for picture in shown:
        head = '<?xml version="1.0" encoding="utf-8"?>\n'
        write_atomically(folder / "figures" / f"{picture.name}.svg", f"{head}{picture.svg}\n".encode())
    here = files("hybridsd_sim.reporting")
    template = Template((here / "page.html").read_text(encoding="utf-8"))
    links = "".join(f'<a href="#{b.anchor}">{b.text}</a>' for b in blocks if isinstance(b, Heading) and b.level == 2)
    style = (here / "page.css").read_text(encoding="utf-8")
    page = template.substitute(title=title, style=style, links=links, body=to_html(blocks))
    write_atomically(folder / "report.md", to_markdown(blocks).encode())
    write_atomically(folder / "index.html", page.encode())
    return folder / "index.html"


SHORT_LETTERS = 18
"""Letters of a cell that stays on one line."""

SIGNS = {True: "✓", False: "✗"}

ANSWERS = {True: "yes", False: "no"}

MARKS = {"measured": "●", "quoted": "■", "modelled": "▲"}
"""The shape of each kind, the best known first."""


class Block(Protocol):
    """Something that stands on a page."""

    def html(self) -> str: ...

    def markdown(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a table: text, smaller lines beneath, a kind or an answer as a mark, sources to point at.

    `kind` is written out in place of the text, `mark` is the kind of the figure in it, as its shape alone.
    """

    text: str
    sub: str = ""
    kind: str = ""
    answer: bool | None = None
    sources: tuple[int, ...] = ()
    mark: str = ""

    def html(self) -> str:
        text = escape(self.text)
        if self.kind:
            text = chip(self.kind)
        elif self.answer is not None:
            text = f'<span class="{ANSWERS[self.answer]}">{SIGNS[self.answer]} {text}</span>'
        shape = f" {mark(self.mark)}" if self.mark else ""
        notes = "".join(f' <a href="#source-{n}">[{n}]</a>' for n in self.sources)
        lines = "".join(
            f"<small{_classes(short=_is_short(line))}>{escape(line)}</small>" for line in self.sub.splitlines()
        )
        return f"{text}{shape}{notes}{lines}"

    def markdown(self) -> str:
        sign = "" if self.answer is None else f"{SIGNS[self.answer]} "
        text = f"{MARKS[self.kind]} {self.kind}" if self.kind else self.text
        shape = f" {MARKS[self.mark]}" if self.mark else ""
        notes = "".join(f" [{n}]" for n in self.sources)
        lines = "".join(f"<br>{line}" for line in self.sub.splitlines())
        return f"{sign}{text}{shape}{notes}{lines}".replace("|", "\\|")


def cell(figure: Mapping[str, Any] | None, show: Show = number, sub: str = "") -> Cell:
    """A figure marked with its kind, its interval beneath, then `sub`; its reason where it has no value."""
    if figure is None:
        return Cell(DASH, sub)
    if figure["value"] is None:
        return Cell(DASH, figure.get("note", "") or "not known")
    lines = "\n".join(filter(None, (beneath(figure, show), sub)))
    return Cell(show(figure["value"]), lines, mark=figure.get("kind", ""))


def answered(good: bool, reason: str = "") -> Cell:  # noqa: FBT001 - the answer itself
    """Yes or no, with its reason."""
    return Cell(ANSWERS[good], reason, answer=good)


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's title and its anchor."""

    text: str
    anchor: str
    level: int = 2

    def html(self) -> str:
        return f'<h{self.level} id="{self.anchor}">{escape(self.text)}</h{self.level}>'

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; `style` is lead or note."""

    text: str
    style: str = ""

    def html(self) -> str:
        style = f' class="{self.style}"' if self.style else ""
        return f"<p{style}>{linked(self.text)}</p>"

    def markdown(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; numbered ones are the sources that cells point at."""

    items: tuple[str, ...]
    numbered: bool = False

    def html(self) -> str:
        if not self.numbered:
            return f"<ul>{''.join(f'<li>{linked(item)}</li>' for item in self.items)}</ul>"
        items = "".join(f'<li id="source-{n}">{linked(item)}</li>' for n, item in enumerate(self.items, 1))
        return f'<ol class="sources">{items}</ol>'

    def markdown(self) -> str:
        return "\n".join(f"{f'{n}.' if self.numbered else '-'} {item}" for n, item in enumerate(self.items, 1))


@dataclass(frozen=True, slots=True)
class Terms:
    """Words and what they mean."""

    items: tuple[tuple[str, str], ...]

    def html(self) -> str:
        return f"<dl>{''.join(f'<dt>{escape(word)}</dt><dd>{escape(text)}</dd>' for word, text in self.items)}</dl>"

    def markdown(self) -> str:
        return "\n".join(f"- **{word}**: {text}" for word, text in self.items)


@dataclass(frozen=True, slots=True)
class Cards:
    """The verdict: questions, each with yes or no and the reason."""

    items: tuple[tuple[str, bool, str], ...]

    def html(self) -> str:
        return f'<ul class="verdict">{"".join(self._card(*item) for item in self.items)}</ul>'

    @staticmethod
    def _card(name: str, good: bool, reason: str) -> str:  # noqa: FBT001 - the answer itself
        sign = f'<span class="sign" aria-hidden="true">{SIGNS[good]}</span>'
        head = f"<strong>{escape(name)}: {ANSWERS[good]}</strong>"
        return f'<li class="{ANSWERS[good]}">{sign}{head}<span>{escape(reason)}</span></li>'

    def markdown(self) -> str:
        return "\n".join(f"- {SIGNS[good]} **{name}: {ANSWERS[good]}.** {reason}" for name, good, reason in self.items)


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its caption; `strong` are the rows to stand out, `words` the columns that hold text."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})

    def html(self) -> str:
        head = "".join(self._html_head(n, text) for n, text in enumerate(self.head))
        rows = "\n".join(self._html_row(n, row) for n, row in enumerate(self.rows))
        return (
            f'<div class="scroll"><table role="table"><caption>{escape(self.caption)}</caption>\n'
            f'<thead><tr role="row">{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
        )

    def _html_head(self, position: int, text: str) -> str:
        return f'<th scope="col" role="columnheader"{_classes(word=position in self.words)}>{escape(text)}</th>'

    def _html_row(self, position: int, row: tuple[Cell, ...]) -> str:
        cells = "".join(self._html_cell(n, item) for n, item in enumerate(row))
        return f'<tr role="row"{_classes(strong=position in self.strong)}>{cells}</tr>'

    def _html_cell(self, position: int, item: Cell) -> str:
        look = _classes(word=position in self.words, short=_is_short(item.text))
        tag, role = ("td", 'role="cell"') if position else ("th", 'scope="row" role="rowheader"')
        return f'<{tag} {role}{look} data-label="{escape(self.head[position])}">{item.html()}</{tag}>'

    def markdown(self) -> str:
        rule = [":---" if n in self.words else "---:" for n in range(len(self.head))]
        rows = [[item.markdown() for item in row] for row in self.rows]
        lines = [f"| {' | '.join(row)} |" for row in (list(self.head), rule, *rows)]
        return "\n".join([f"*{self.caption}*", "", *lines])


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: its file's name, title, SVG, what it shows in words, and the kinds of the numbers behind it."""

    name: str
    title: str
    svg: str
    alt: str
    caption: str
    kinds: tuple[str, ...] = ()

    def html(self) -> str:
        drawing = self.svg.replace(f'aria-label="{escape(self.title)}"', f'aria-label="{escape(self.alt)}"', 1)
        caption = f"{escape(self.caption)} {' '.join(map(chip, self.kinds))}"
        figure = f'<figure><div class="scroll" tabindex="0">{drawing}</div><figcaption>{caption}</figcaption></figure>'
        return f'<h3 id="figure-{self.name}">{escape(self.title)}</h3>\n{figure}'

    def markdown(self) -> str:
        kinds = f" ({', '.join(self.kinds)})" if self.kinds else ""
        alt = self.alt.replace("[", "(").replace("]", ")")
        return f"### {self.title}\n\n![{alt}](figures/{self.name}.svg)\n\n*{self.caption}{kinds}*"


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that a reader opens when they want them, or that stand open to be closed."""

    summary: str
    blocks: tuple[Block, ...]
    opened: bool = False

    def html(self) -> str:
        tag = "details open" if self.opened else "details"
        return f"<{tag}><summary>{escape(self.summary)}</summary>\n{to_html(self.blocks)}\n</details>"

    def markdown(self) -> str:
        return f"**{self.summary}**\n\n{to_markdown(self.blocks)}".rstrip()


def to_html(blocks: Iterable[Block]) -> str:
    """Blocks as HTML, in order."""
    return "\n".join(block.html() for block in blocks)


def to_markdown(blocks: Iterable[Block]) -> str:
    """Blocks as Markdown, in order; figures are linked under `figures/`."""
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def chip(kind: str) -> str:
    """A kind as a small label: filled, outlined or dashed, so that it is told apart without colours."""
    return f'<span class="chip {kind}">{MARKS[kind]} {kind}</span>'


def mark(kind: str) -> str:
    """A kind as its shape alone, for a figure among figures; readers that show no shapes hear the word."""
    return f'<span class="mark {kind}" role="img" aria-label="{kind}" title="{kind}">{MARKS[kind]}</span>'


def linked(text: str) -> str:
    """Text with its addresses and arXiv numbers as links."""
    safe = re.sub(r"(https?://[^\s<>()]+[^\s<>().,;:])", r'<a href="\1">\1</a>', escape(text))
    return re.sub(r"(arXiv[: ](\d{4}\.\d{4,5}))(?!\d)", r'<a href="https://arxiv.org/abs/\2">\1</a>', safe)


def _classes(**names: bool) -> str:
    found = " ".join(name for name, is_so in names.items() if is_so)
    return f' class="{found}"' if found else ""


def _is_short(text: str) -> bool:
    """Short figures and intervals stay on one line; reasons wrap."""
    return 0 < len(text) <= SHORT_LETTERS


def ranged(figure: Data) -> Cell:
    """A figure with its 90% interval, and that in per cent, beneath."""
    return cell(figure, number, reach(figure))
