"""Reads a written page, its pictures and the numbers in it, and doesn't forgive what a browser would."""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

# Elements that are never closed.
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass(eq=False)
class Element:
    """One element of a page, with what it holds."""

    tag: str
    attributes: dict[str, str]
    parent: "Element | None"
    parts: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str | None = None) -> Iterator["Element"]:
        for part in self.parts:
            if isinstance(part, Element):
                if tag in (None, part.tag):
                    yield part
                yield from part.all(tag)

    def words(self) -> str:
        return re.sub(
            r"\s+", " ", "".join(part if isinstance(part, str) else part.words() for part in self.parts)
        ).strip()

    def own(self, tag: str) -> list["Element"]:
        return [part for part in self.parts if isinstance(part, Element) and part.tag == tag]


class Reader(HTMLParser):
    """Reads a page and doesn't forgive: every tag that is opened must be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.at is self.root, f"<{self.at.tag}> isn't closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.parts.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.parts.append(data)


@dataclass
class Page:
    """A page that was written, and the folder of its pictures."""

    file: Path
    text: str
    root: Element

    @property
    def pictures(self) -> Path:
        return self.file.parent / "pictures"

    @property
    def stems(self) -> list[str]:
        return sorted({path.stem for path in self.pictures.iterdir()})

    @property
    def sections(self) -> dict[str, Element]:
        return {
            element.attributes["id"]: element for element in self.root.all() if element.tag in ("section", "details")
        }

    def lead(self, key: str) -> list[str]:
        return [paragraph.words() for paragraph in self.sections[key].own("p")]

    def svgs(self) -> dict[str, Element]:
        return {element.attributes["aria-label"].split(". ")[0]: element for element in self.root.all("svg")}

    def table(self, title: str) -> dict[str, list[str]]:
        """Return the cells of the table of that title: first cell -> the others; the head as `head`."""
        (item,) = [item for item in self.root.all("div") if [heading.words() for heading in item.own("h3")] == [title]]
        rows = [[" ".join(_cell(cell)) for cell in row.parts if isinstance(cell, Element)] for row in item.all("tr")]
        return {"head": rows[0], **{row[0]: row[1:] for row in rows[1:]}}

    def numbers(self) -> dict[str, bytes]:
        """Return name of the file -> the CSV that lies in the page."""
        links = [element.attributes for element in self.root.all("a") if "download" in element.attributes]
        return {
            link["download"]: base64.b64decode(link["href"].removeprefix("data:text/csv;base64,"), validate=True)
            for link in links
        }


def _cell(cell: Element) -> list[str]:
    return [
        part.strip() if isinstance(part, str) else part.words()
        for part in cell.parts
        if part and not str(part).isspace()
    ]


def read(file: Path) -> Page:
    text = file.read_text(encoding="utf-8")
    return Page(file, text, Reader(text).root)
