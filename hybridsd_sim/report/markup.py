"""Numbers, tables, lists and figures as HTML and as Markdown: the same blocks, two ways of writing them.

A `Cell` is what a table shows at one place: text, a smaller second line, and a mark (a label such as measured, quoted or
modelled, or yes and no) that never speaks by colour alone. What nobody knows is an em dash with its reason beneath.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

DASH, MINUS = "—", "\N{MINUS SIGN}"
SIGNIFICANT = 3
SHORT_LETTERS = 18
MARKS = ("measured", "quoted", "modelled", "yes", "no")
SIGNS = {"yes": "✓", "no": "✗"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a table: text, a smaller second line, a mark, and the number of a source to point at."""

    text: str
    sub: str = ""
    mark: str = ""
    sources: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's title and its anchor."""

    text: str
    anchor: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; `style` is lead or note."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list; numbered ones can be pointed at as sources."""

    items: tuple[str, ...]
    numbered: bool = False


@dataclass(frozen=True, slots=True)
class Terms:
    """Words and what they mean."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cards:
    """The verdict: a question, yes or no, and the reason, side by side."""

    items: tuple[tuple[str, bool, str], ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its caption; `strong` are the rows to stand out, `words` the columns that hold text."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    strong: frozenset[int] = frozenset()
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: its file's name, the SVG, what it shows in words, and the kinds of the numbers behind it."""

    name: str
    title: str
    svg: str
    alt: str
    caption: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that a reader opens when they want them."""

    summary: str
    blocks: tuple[Any, ...] = field(default=())


def number(value: float | None) -> str:
    """Three significant digits with separated thousands; whole numbers in full; an em dash for what is not known."""
    if value is None or not math.isfinite(value):
        return DASH
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{SIGNIFICANT - 1}e}")
    size = math.floor(math.log10(abs(rounded)))
    if size < -5:
        mantissa, _, exponent = f"{value:.{SIGNIFICANT - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{rounded:,.{max(0, SIGNIFICANT - 1 - size)}f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share of 1 as per cent, so that 99.97 % does not read as 100 %."""
    if share is None or not math.isfinite(share):
        return DASH
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    if not 0.0001 <= share <= 0.9999:
        return "< 0.01 %" if share < 0.5 else "> 99.99 %"
    return f"{100 * share:.{1 if 0.001 <= share <= 0.999 else 2}f} %"


def listed(items: Sequence[str]) -> str:
    """One, two and three."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def cell(figure: Mapping[str, Any] | None, show: Any = number, sub: str = "") -> Cell:
    """A figure with its interval beneath, then `sub`; its reason where it has no value."""
    if figure is None:
        return Cell(DASH, sub)
    if figure["value"] is None:
        return Cell(DASH, figure.get("note", "") or "not known")
    return Cell(show(figure["value"]), "\n".join(filter(None, (_interval(figure, show), sub))))


def _interval(figure: Mapping[str, Any], show: Any) -> str:
    """The interval at the digits shown; nothing where it does not differ from the figure there."""
    low, high = figure.get("low"), figure.get("high")
    if low is None and high is None:
        return "no interval" if figure.get("note") else ""
    ends = tuple("?" if end is None else show(end) for end in (low, high))
    if set(ends) == {show(figure["value"])}:
        return ""
    beyond = next((end for end in ends if end[0] in "<>"), "")
    return beyond or f"{ends[0].removesuffix(' %')}–{ends[1]}"


def to_html(blocks: Iterable[Any]) -> str:
    """Blocks as HTML, in order."""
    return "\n".join(_html(block) for block in blocks)


def to_markdown(blocks: Iterable[Any]) -> str:
    """Blocks as Markdown, in order; figures are linked under `figures/`."""
    return "\n\n".join(text for block in blocks if (text := _markdown(block))) + "\n"


def _html(block: Any) -> str:
    match block:
        case Heading():
            return f'<h{block.level} id="{block.anchor}">{escape(block.text)}</h{block.level}>'
        case Paragraph():
            style = f' class="{block.style}"' if block.style else ""
            return f"<p{style}>{_linked(block.text)}</p>"
        case Bullets():
            return _html_list(block)
        case Terms():
            rows = "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in block.items)
            return f"<dl>{rows}</dl>"
        case Cards():
            return f'<ul class="verdict">{"".join(_card(*item) for item in block.items)}</ul>'
        case Table():
            return _html_table(block)
        case Picture():
            caption = f"{escape(block.caption)} {' '.join(_chip(kind) for kind in block.kinds)}"
            return f'<h3 id="figure-{block.name}">{escape(block.title)}</h3>\n<figure><div class="scroll" tabindex="0">{block.svg}</div><figcaption>{caption}</figcaption></figure>'
        case Fold():
            return f"<details><summary>{escape(block.summary)}</summary>\n{to_html(block.blocks)}\n</details>"
    raise TypeError(f"no way to write a {type(block).__name__}")


def _html_list(block: Bullets) -> str:
    if not block.numbered:
        return f"<ul>{''.join(f'<li>{_linked(item)}</li>' for item in block.items)}</ul>"
    items = "".join(f'<li id="source-{n}">{_linked(item)}</li>' for n, item in enumerate(block.items, 1))
    return f'<ol class="sources">{items}</ol>'


def _card(name: str, good: bool, reason: str) -> str:
    answer = "yes" if good else "no"
    head = f"<strong>{escape(name)}: {answer}</strong>"
    return f'<li class="{answer}"><span class="sign" aria-hidden="true">{SIGNS[answer]}</span>{head}<span>{escape(reason)}</span></li>'


def _html_table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" role="columnheader"{_look(table, n)}>{escape(text)}</th>' for n, text in enumerate(table.head)
    )
    rows = "\n".join(_html_row(table, n, row) for n, row in enumerate(table.rows))
    return (
        f'<div class="scroll"><table role="table"><caption>{escape(table.caption)}</caption>\n'
        f'<thead><tr role="row">{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _html_row(table: Table, number_of: int, row: Sequence[Cell]) -> str:
    cells = "".join(_html_cell(table, n, item) for n, item in enumerate(row))
    strong = ' class="strong"' if number_of in table.strong else ""
    return f'<tr role="row"{strong}>{cells}</tr>'


def _html_cell(table: Table, position: int, item: Cell) -> str:
    text = _chip(item.mark, item.text) if item.mark else escape(item.text)
    notes = "".join(f' <a href="#source-{n}">[{n}]</a>' for n in item.sources)
    sub = "".join(f"<small{_short(line)}>{escape(line)}</small>" for line in item.sub.splitlines())
    label = f' data-label="{escape(table.head[position])}"'
    inner = f"{text}{notes}{sub}"
    if position == 0:
        return f'<th scope="row" role="rowheader"{_look(table, 0, item.text)}{label}>{inner}</th>'
    return f'<td role="cell"{_look(table, position, item.text)}{label}>{inner}</td>'


def _look(table: Table, position: int, text: str = "") -> str:
    """Words to the left, figures to the right."""
    names = [
        name for name, is_so in (("word", position in table.words), ("short", 0 < len(text) <= SHORT_LETTERS)) if is_so
    ]
    return f' class="{" ".join(names)}"' if names else ""


def _short(text: str) -> str:
    """Short figures and intervals stay on one line; reasons wrap."""
    return ' class="short"' if len(text) <= SHORT_LETTERS else ""


def _chip(mark: str, text: str = "") -> str:
    sign = f"{SIGNS[mark]} " if mark in SIGNS else ""
    return f'<span class="chip {mark}">{sign}{escape(text or mark)}</span>'


def _linked(text: str) -> str:
    """Text with its addresses and arXiv numbers as links."""
    linked = re.sub(r"(https?://[^\s<>()]+[^\s<>().,;:])", r'<a href="\1">\1</a>', escape(text))
    return re.sub(r"(arXiv[: ](\d{4}\.\d{4,5}))(?!\d)", r'<a href="https://arxiv.org/abs/\2">\1</a>', linked)


def _markdown(block: Any) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Bullets():
            marks = [f"{n}." if block.numbered else "-" for n in range(1, len(block.items) + 1)]
            return "\n".join(f"{mark} {item}" for mark, item in zip(marks, block.items, strict=True))
        case Terms():
            return "\n".join(f"- **{word}**: {meaning}" for word, meaning in block.items)
        case Cards():
            answers = [(name, "yes" if good else "no", reason) for name, good, reason in block.items]
            return "\n".join(f"- {SIGNS[answer]} **{name}: {answer}.** {reason}" for name, answer, reason in answers)
        case Table():
            return _markdown_table(block)
        case Picture():
            kinds = f" ({', '.join(block.kinds)})" if block.kinds else ""
            alt = block.alt.replace("[", "(").replace("]", ")")
            return f"### {block.title}\n\n![{alt}](figures/{block.name}.svg)\n\n*{block.caption}{kinds}*"
        case Fold():
            return f"**{block.summary}**\n\n{to_markdown(block.blocks)}".rstrip()
    raise TypeError(f"no way to write a {type(block).__name__}")


def _markdown_table(table: Table) -> str:
    rule = [":---" if n in table.words else "---:" for n in range(len(table.head))]
    rows = [
        [_markdown_cell(item, number_of in table.strong) for item in row] for number_of, row in enumerate(table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in (list(map(_bar, table.head)), rule, *rows)]
    return "\n".join([f"*{table.caption}*", "", *lines])


def _markdown_cell(item: Cell, strong: bool) -> str:
    text = _bar(f"{SIGNS[item.mark]} {item.text or item.mark}" if item.mark in SIGNS else item.text or item.mark)
    text = f"**{text}**" if strong and text else text
    notes = "".join(f" [{n}]" for n in item.sources)
    return f"{text}{notes}{f'<br>{_bar(item.sub)}' if item.sub else ''}"


def _bar(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
