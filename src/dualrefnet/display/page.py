"""The HTML page of a report: one file without scripts; nothing is fetched from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from dualrefnet.display.figure import ReportFigure, inline_svg
from dualrefnet.display.format import PrintedTable
from dualrefnet.errors import DependencyError
from dualrefnet.files import csv_text

# The data of a larger table are not embedded; they lie beside the page as a file.
EMBEDDED_BYTES = 100_000


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    title: str
    intro: list[str]
    items: Sequence[PrintedTable | ReportFigure] = ()
    preformatted: str = ""
    folded: bool = False

    @property
    def figures(self) -> list[ReportFigure]:
        """The figures among the items."""
        return [item for item in self.items if isinstance(item, ReportFigure)]


def render_page(title: str, subtitle: str, notes: Sequence[str], sections: Sequence[Section], photographs: bool) -> str:
    """Return the page."""
    try:
        import jinja2
    except ImportError:
        raise DependencyError("the report needs Jinja2: pip install 'dualrefnet[report]'") from None
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
    environment.tests["figure"] = lambda item: isinstance(item, ReportFigure)
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, subtitle=subtitle, notes=notes, sections=sections, photographs=photographs)


def _csv_link(data: pd.DataFrame, name: str) -> str:
    """Return a link that saves the numbers of a figure, or the name of the file beside the page that holds them."""
    text = csv_text(data).encode()
    if len(text) > EMBEDDED_BYTES:
        return f"Data: <code>pictures/{escape(name)}.csv</code>"
    content = base64.b64encode(text).decode()
    return f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{content}">Data (CSV)</a>'
