"""The page: one HTML file with its style, scripts and data inside, which asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

from kvtune.cli.amounts import size
from kvtune.report import evidence, numbers, sections, sentences
from kvtune.report.attention import attention
from kvtune.report.folder import Run
from kvtune.report.markup import Child, Markup, data_block, joined, script, tag
from kvtune.report.sections import Figures

# what the browser lets the page do, whatever gets into it: run its own two programs
POLICY = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
NAMES = {
    "front": "Front",
    "recipe": "Recipe",
    "axes": "Tokens, bits and rank",
    "rank": "Rank and bits",
    "prices": "Prices",
    "spectra": "Spectra",
    "attention": "Attention",
    "predictions": "Predictions",
    "scores": "Tasks",
    "run": "Run",
}


def page(run: Run) -> bytes:
    """The whole file; the same run gives the same bytes."""
    figures: Figures = {}
    place = run.folder.resolve().name or "."
    parts = {
        "front": sections.front(run, figures),
        "recipe": sections.recipe(run, figures),
        "axes": evidence.all_axes(run, figures),
        "rank": evidence.rank_and_bits(run, figures),
        "prices": evidence.price_table(run, figures),
        "spectra": evidence.spectrum(run, figures),
        "attention": attention(run, figures),
        "predictions": evidence.predictions(run, figures),
        "scores": evidence.scores(run, figures),
        "run": evidence.about(run, place),
    }
    there = {name: made for name, made in parts.items() if made}
    body = tag(
        "body",
        tag("a", "Skip to the results", href="#results", class_="skip"),
        _header(run, tuple(there)),
        tag("main", _headline(run, place), *there.values(), id="results", tabindex=-1),
        tag("footer", tag("p", f"Made by kvtune report {place}")),
        data_block("figures", figures),
        *(script(source) for source in _sources()),
    )
    title = f"{run.model or 'model'}: kvtune report"
    return f"<!doctype html>\n{tag('html', _head(title), body, lang='en')}\n".encode()


def _head(title: str) -> Markup:
    hashes = " ".join(f"'sha256-{_digest(source)}'" for source in _sources())
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY.format(hashes=hashes)),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),  # else a browser asks the server for one
        tag("style", Markup(_asset("page.css"))),
    )


def _header(run: Run, names: tuple[str, ...]) -> Markup:
    links = [tag("a", NAMES[name], href=f"#{name}") for name in names]
    toggle = tag("button", "Dark theme", type="button", id="theme")
    return tag(
        "header",
        tag("div", tag("p", "kvtune report", class_="brand"), toggle, class_="bar"),
        tag("h1", run.model or "A model"),
        tag("nav", *links, aria_label="Sections"),
    )


def _headline(run: Run, place: str) -> Markup:
    said: list[Child] = [tag("p", _unbroken(sentences.headline(run)), class_="lead")]
    if point := run.chosen:
        told: dict[str, Child] = {
            "times smaller": f"{point.ratio:.2f}",
            "true bits per value": f"{point.bits:.2f}",
            "KL in nats": numbers.significant(point.kl),
            f"at {point.bytes_context:,} tokens": size(point.bytes),
        }
        said += [tag("p", _unbroken(sentences.plainly(point))), _figures(told)]
    else:
        said.append(tag("p", "Next: ", tag("code", f"kvtune search {place}")))
    return tag("div", *said, class_="headline")


def _unbroken(text: str) -> str:
    """A text in which no line ends between a number and its unit."""
    return re.sub(r"(\d) (?=(?:bytes|[kMGT]B|%|nats)\b|%)", "\\1\u00a0", text)


def _figures(told: dict[str, Child]) -> Markup:
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in told.items()]
    return tag("dl", joined(rows), class_="large")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


@cache
def _sources() -> tuple[str, str]:
    """plotly.js and the page's own program."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs(), _asset("page.js")


def _asset(name: str) -> str:
    return resources.files("kvtune.report").joinpath(name).read_text(encoding="utf-8")
