"""What pages are made of: headings, paragraphs, lists, tables, figures, each of which `rendering` writes as HTML.

How a block reads as Markdown it says itself.

A `Cell` is what a table shows at one place: text, smaller lines beneath, and a mark (measured, quoted or modelled; yes
or no) that never speaks by colour alone. A kind has one shape everywhere, in figures too. What nobody knows is an em
dash with its reason beneath.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol

from hybridsd_sim.estimate import DASH, Show, number
from hybridsd_sim.reporting.labels import Data, interval_line, reach

SIGNS = {True: "✓", False: "✗"}

ANSWERS = {True: "yes", False: "no"}

MARKS = {"measured": "●", "quoted": "■", "modelled": "▲"}
"""The shape of each kind, the best known first."""


class Block(Protocol):
    """Something that stands on a page."""

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
    lines = "\n".join(filter(None, (interval_line(figure, show), sub)))
    return Cell(show(figure["value"]), lines, mark=figure.get("kind", ""))


def ranged(figure: Data) -> Cell:
    """A figure with its 90% interval, and that in per cent, beneath."""
    return cell(figure, number, reach(figure))


def answered(good: bool, reason: str = "") -> Cell:  # noqa: FBT001 - the answer itself
    """Yes or no, with its reason."""
    return Cell(ANSWERS[good], reason, answer=good)


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's title and its anchor."""

    text: str
    anchor: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; `style` is lead or note."""

    text: str
    style: str = ""

    def markdown(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; numbered ones are the sources that cells point at."""

    items: tuple[str, ...]
    numbered: bool = False

    def markdown(self) -> str:
        return "\n".join(f"{f'{n}.' if self.numbered else '-'} {item}" for n, item in enumerate(self.items, 1))


@dataclass(frozen=True, slots=True)
class Terms:
    """Words and what they mean."""

    items: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        return "\n".join(f"- **{word}**: {text}" for word, text in self.items)


@dataclass(frozen=True, slots=True)
class Cards:
    """The verdict: questions, each with yes or no and the reason."""

    items: tuple[tuple[str, bool, str], ...]

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

    @property
    def described(self) -> str:
        """The SVG as it stands on the page: labelled with what it shows in words."""
        return self.svg.replace(f'aria-label="{escape(self.title)}"', f'aria-label="{escape(self.alt)}"', 1)

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

    def markdown(self) -> str:
        return "\n\n".join((f"**{self.summary}**", *(block.markdown() for block in self.blocks)))
