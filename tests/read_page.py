"""Read a written page, its figures and their numbers, more strictly than a browser does."""

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
    tag: str
    attributes: dict[str, str]
    parent: "Element | None"
    parts: list["Element | str"] = field(default_factory=list)

    def all(self, tag: str | None = None) -> Iterator["Element"]:
        for part in self.own():
            if tag in (None, part.tag):
                yield part
            yield from part.all(tag)

    def own(self, tag: str | None = None) -> list["Element"]:
        return [part for part in self.parts if isinstance(part, Element) and tag in (None, part.tag)]

    def words(self, between: str = "") -> str:
        text = between.join(part if isinstance(part, str) else part.words() for part in self.parts)
        return re.sub(r"\s+", " ", text).strip()


class Reader(HTMLParser):
    """Every tag that is opened must be closed, in order."""

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

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.parts.append(data)


class Page:
    """A page that was written, and the folder of its figures."""

    def __init__(self, file: Path) -> None:
        self.file, self.text, self.pictures = file, file.read_text(encoding="utf-8"), file.parent / "pictures"
        self.root = Reader(self.text).root
        self.stems = sorted({path.stem for path in self.pictures.iterdir()})
        self.sections = {one.attributes["id"]: one for one in self.root.all() if one.tag in ("section", "details")}
        self.svgs = {one.attributes["aria-label"].split(". ")[0]: one for one in self.root.all("svg")}

    def intro(self, key: str) -> list[str]:
        section = self.sections[key]
        (body,) = section.own("div") if section.tag == "details" else [section]
        return [paragraph.words() for paragraph in body.own("p") if "class" not in paragraph.attributes]

    def table(self, title: str) -> dict[str, list[str]]:
        """Return the cells of the table of that title: first cell -> the others; the head as `head`."""
        (item,) = [one for one in self.root.all("div") if [heading.words() for heading in one.own("h3")] == [title]]
        rows = [[cell.words(" ") for cell in row.own()] for row in item.all("tr")]
        return {"head": rows[0], **{row[0]: row[1:] for row in rows[1:]}}

    def numbers(self) -> dict[str, bytes]:
        """Return name of the file -> the CSV embedded in the page."""
        links = [one.attributes for one in self.root.all("a") if "download" in one.attributes]
        prefix = "data:text/csv;base64,"
        return {one["download"]: base64.b64decode(one["href"].removeprefix(prefix), validate=True) for one in links}
