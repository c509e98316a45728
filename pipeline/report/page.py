"""Pieces of the page: every text that goes in is escaped, for only what is `Markup` is not."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

__all__ = ["details", "join", "page", "paragraph", "table", "tiles"]

STYLE = Path(__file__).with_name("style.css")


def join(pieces: Iterable[Markup]) -> Markup:
    """Pieces one after the other."""
    return Markup("").join(pieces)


def paragraph(text: str | Markup, kind: str = "") -> Markup:
    """A paragraph; `kind` is a class of the style sheet."""
    return Markup('<p class="{}">{}</p>' if kind else "<p>{1}</p>").format(kind, text)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """A table that scrolls sideways where it is too wide; empty without rows.

    Args:
        title: what it shows; on the page, and read out.
        header: one name a column, the first of the names of the rows; empty names make a list of pairs.
        rows: cells; None is left empty.
    """
    if not rows:
        return Markup("")
    head = join(Markup('<th scope="col">{}</th>').format(name) for name in header)
    body = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            row[0], join(Markup("<td>{}</td>").format("" if cell is None else cell) for cell in row[1:])
        )
        for row in rows
    )
    return Markup(
        '<div class="wide" tabindex="0" role="group" aria-label="{0}"><table class="{1}"><caption>{0}'
        "</caption>{2}<tbody>{3}</tbody></table></div>\n"
    ).format(
        title,
        "" if any(header) else "pairs",
        Markup("<thead><tr>{}</tr></thead>").format(head) if any(header) else "",
        body,
    )


def details(title: str, body: Markup) -> Markup:
    """What is shown on demand; empty where there is nothing."""
    if not body:
        return body
    return Markup("<details><summary>{}</summary>{}</details>\n").format(title, body)


def tiles(found: Sequence[tuple[str, str, str]]) -> Markup:
    """Values that stand out: (value, what it is, a note)."""
    items = join(
        Markup("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>").format(name, value, note)
        for value, name, note in found
    )
    return Markup('<dl class="tiles">{}</dl>\n').format(items) if found else Markup("")


def page(title: str, head: Markup, sections: Sequence[tuple[str, str, Markup]]) -> str:
    """The document.

    Args:
        title: of the window.
        head: what comes before the first section.
        sections: anchor, title and content; without content it is left out.
    """
    there = [section for section in sections if section[2]]
    contents = join(Markup('<li><a href="#{}">{}</a></li>').format(anchor, name) for anchor, name, _ in there)
    body = join(
        Markup(
            '<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>{2}</section>\n'
        ).format(anchor, name, content)
        for anchor, name, content in there
    )
    return Markup(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing is fetched, whatever a text should hold
        '<meta http-equiv="Content-Security-Policy" content="'
        """default-src 'none'; style-src 'unsafe-inline'; img-src data:">"""
        '<meta name="color-scheme" content="light dark">'
        '<link rel="icon" href="data:,"><style>{}</style></head>\n<body>'
        '<header>{}</header><nav aria-label="Contents"><ul>{}</ul></nav><main>{}</main></body></html>\n'
    ).format(title, Markup(STYLE.read_text(encoding="utf-8")), head, contents, body)
