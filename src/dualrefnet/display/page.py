"""The HTML page of a report: one file without scripts; nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from dualrefnet.display.figure import ReportFigure, inline_svg
from dualrefnet.display.format import PrintedTable, sentence
from dualrefnet.errors import DependencyError, install_hint
from dualrefnet.files import csv_text

if TYPE_CHECKING:
    from dualrefnet.data.check import Finding

# The data of a larger table are not embedded; they lie beside the page as a file.
EMBEDDED_BYTES = 100_000
# The level of a finding in words, for those who can't tell the colours.
LEVELS = {"PASS": "passed", "WARN": "warning", "FAIL": "failed", "": "not measured"}


@dataclass(frozen=True)
class Section:
    """A section of the page; `findings` are what it contributes to the verdict."""

    key: str
    title: str
    intro: list[str]
    items: Sequence[PrintedTable | ReportFigure] = ()
    preformatted: str = ""
    folded: bool = True
    findings: Sequence[Finding] = ()

    @property
    def figures(self) -> list[ReportFigure]:
        return [item for item in self.items if isinstance(item, ReportFigure)]


class Result(NamedTuple):
    """A headline number."""

    name: str
    value: str
    interval: str
    note: str


class Line(NamedTuple):
    """A question, its level (empty: not measured), the sentence that matters, and the section that says more."""

    question: str
    level: str
    text: str
    key: str


@dataclass(frozen=True)
class Verdict:
    """What the page begins with."""

    results: Sequence[Result]
    lines: Sequence[Line]


def render_page(
    title: str,
    subtitle: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    photographs: bool,
    verdict: Verdict | None = None,
) -> str:
    try:
        import jinja2
    except ImportError:
        raise DependencyError(f"the report needs Jinja2: {install_hint('report')}") from None
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualrefnet.display", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["svg"] = lambda figure: Markup(inline_svg(figure))
    environment.filters["csv_link"] = lambda data, name: Markup(_csv_link(data, name))
    environment.filters |= {"defined": PrintedTable.defined, "sentence": sentence}
    environment.tests["figure"] = lambda item: isinstance(item, ReportFigure)
    template = environment.get_template("page.html.jinja")
    return template.render(
        title=title,
        subtitle=subtitle,
        notes=notes,
        sections=sections,
        photographs=photographs,
        verdict=verdict,
        levels=LEVELS,
    )


def _csv_link(data: pd.DataFrame, name: str) -> str:
    """Return a link that saves the numbers of a figure, or the name of the file beside the page that holds them."""
    text = csv_text(data).encode()
    if len(text) > EMBEDDED_BYTES:
        return f"Data: <code>pictures/{escape(name)}.csv</code>"
    content = base64.b64encode(text).decode()
    return f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{content}">Data (CSV)</a>'
