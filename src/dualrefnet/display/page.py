"""What a page is made of: sections of words, tables and pictures."""

# also: The page: one HTML file with everything in it, no script, nothing fetched from elsewhere.

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import pandas as pd
from markupsafe import Markup

from dualrefnet.display.figure import ReportFigure, inline_svg
from dualrefnet.display.format import PrintedTable
from dualrefnet.errors import DependencyError

try:
    import jinja2
except ImportError:
    raise DependencyError("the report needs Jinja2: pip install 'dualrefnet[report]'") from None


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: its anchor.
        title: its heading, in plain words.
        lead: what it says, in sentences, before any picture.
        items: tables and pictures.
        text: set as it is, in letters of one width, below the items.
        folded: shown only when it is opened: for what few readers look up.
    """

    key: str
    title: str
    lead: list[str]
    items: list[PrintedTable | ReportFigure] = field(default_factory=list)
    text: str = ""
    folded: bool = False

    @property
    def pictures(self) -> list[ReportFigure]:
        """The pictures among the items."""
        return [item for item in self.items if isinstance(item, ReportFigure)]


# A table that is larger isn't put into the page; it lies beside it as a file.
EMBEDDED_BYTES = 100_000


def render_page(title: str, subtitle: str, notes: Sequence[str], sections: Sequence[Section], photographs: bool) -> str:
    """Return the page.

    Args:
        title: of the page.
        subtitle: one line below it.
        notes: what a reader must know before believing a number; in a box at the top.
        sections: in order.
        photographs: the page shows photographs of patients, and says so.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualrefnet.display", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["svg"] = lambda picture: Markup(inline_svg(picture))
    environment.filters["csv_link"] = _csv_link
    environment.tests["picture"] = lambda item: isinstance(item, ReportFigure)
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, subtitle=subtitle, notes=notes, sections=sections, photographs=photographs)


def _csv_link(data: pd.DataFrame, name: str) -> Markup:
    """Return a link that saves the numbers of a picture, or the name of the file beside the page that holds them."""
    text = data.to_csv(index=False).encode()
    if len(text) > EMBEDDED_BYTES:
        return Markup(f"Numbers: <code>pictures/{escape(name)}.csv</code>")
    content = base64.b64encode(text).decode()
    return Markup(f'<a download="{escape(name)}.csv" href="data:text/csv;base64,{content}">Numbers (CSV)</a>')
