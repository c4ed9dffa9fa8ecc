"""HTML that cannot be broken out of: every text is escaped unless it is markup already."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

WIDE = 6  # columns; in wider tables the first one stays where it is
VOID = frozenset({"link", "meta"})  # elements that have no end


class Markup(str):
    """Text that is HTML already; `tag` and `joined` make it, nothing else does."""

    __slots__ = ()


Child = str | int | None
Attribute = str | int | bool | None


def tag(name: str, *children: Child, **attributes: Attribute) -> Markup:
    """An element: children that are not Markup are escaped, None is left out.

    `class_` stands for `class` and `aria_label` for `aria-label`; True is a bare attribute, False
    and None are none.
    """
    opened = f"<{name}{''.join(_attribute(*item) for item in attributes.items())}>"
    return Markup(opened if name in VOID else f"{opened}{joined(children)}</{name}>")


def joined(children: Iterable[Child]) -> Markup:
    """Children one after the other."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def _escaped(child: str | int) -> str:
    return child if isinstance(child, Markup) else escape(str(child))


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    shown = name.rstrip("_").replace("_", "-")
    return f" {shown}" if value is True else f' {shown}="{escape(str(value))}"'


def data_block(name: str, value: Any) -> Markup:
    """A JSON value for scripts of the page; no text in it can end the block or open a comment.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def script(source: str) -> Markup:
    """A program of the page's own.

    Raises:
        ValueError: it holds the end of a script, or what would hide that end.
    """
    lowered = source.lower()
    if "</script" in lowered or "<!--" in lowered:
        raise ValueError("a script that holds </script or <!-- cannot be embedded as it is")
    return Markup(f"<script>{source}</script>")


def table(
    head: Iterable[Child], rows: Iterable[Iterable[Child]], caption: str, *, words: int = 1
) -> Markup:
    """A table that scrolls inside itself; its first column heads the rows.

    Args:
        words: how many columns, from the left, hold text; the others are numbers.
    """

    def cells(kind: str, items: Iterable[Child], scope: str) -> Markup:
        made = []
        for index, item in enumerate(items):
            number = None if index < words else "number"
            heads = kind == "th" or index == 0
            found = "th" if heads else "td"
            made.append(tag(found, item, scope=scope if heads else None, class_=number))
        return tag("tr", *made)

    names = list(head)
    inside = tag(
        "table",
        tag("caption", caption),
        tag("thead", cells("th", names, "col")),
        tag("tbody", *(cells("td", row, "row") for row in rows)),
        class_="wide" if len(names) > WIDE else None,
    )
    # what scrolls must be reachable with the keyboard
    return tag("div", inside, class_="scrolls", tabindex=0, role="region", aria_label=caption)
