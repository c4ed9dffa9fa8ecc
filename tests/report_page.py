"""For the tests of reports: a page, read as a browser reads it."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """A page's elements, its texts, and what stands in its scripts and style."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.raw: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(data.decode())
        assert self.open == [], "an element has no end"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw.append((self.open[-1], data))
        else:
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:40]}")

    def all(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    @property
    def figures(self) -> dict[str, dict]:
        """The data of the charts."""
        ids = [attrs.get("id") for tag, attrs in self.elements if tag == "script"]
        scripts = [text for tag, text in self.raw if tag == "script"]
        return json.loads(scripts[ids.index("figures")])

    @property
    def programs(self) -> list[str]:
        """The scripts that run."""
        kinds = [attrs.get("type") for tag, attrs in self.elements if tag == "script"]
        scripts = [text for tag, text in self.raw if tag == "script"]
        return [text for kind, text in zip(kinds, scripts, strict=True) if kind is None]
