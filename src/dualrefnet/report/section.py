"""What a page is made of: sections of words, tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualrefnet.evaluation.printed_table import PrintedTable
from dualrefnet.figures.picture import Picture


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
    items: list[PrintedTable | Picture] = field(default_factory=list)
    text: str = ""
    folded: bool = False

    @property
    def pictures(self) -> list[Picture]:
        """The pictures among the items."""
        return [item for item in self.items if isinstance(item, Picture)]
