"""How numbers of a page are written: three decimals, a real minus sign, intervals in brackets."""

# also: One printed table, written as Markdown, as LaTeX and in the page from the same cells.

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dualrefnet.evaluation.bootstrap import interval_suffix

CI = interval_suffix(0.95)


def percent(values: Mapping[str, Any], key: str) -> str:
    """Return a share of metrics.json in percent with its interval."""
    if values[key] is None:
        return "an unknown share"
    bounds = values.get(key + CI)
    return f"{values[key]:.0%}" + (f" [{bounds[0]:.0%} to {bounds[1]:.0%}]" if bounds else "")


def bounds_of(values: Mapping[str, Any], key: str, form: str) -> str:
    """Return the interval of a value of metrics.json; empty if it has none."""
    bounds = values.get(key + CI)
    return pair(bounds[0], bounds[1], form) if bounds else ""


def pair(low: float, high: float, form: str) -> str:
    """Return an interval in brackets; empty if there is none."""
    return "" if pd.isna(low) else f"[{low:{form}}, {high:{form}}]".replace("-", "−")


def number(value: float | None) -> str:
    """Return a value with three decimals; a dash if it is undefined."""
    return "–" if value is None or pd.isna(value) else f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}".replace("-", "−")


# What LaTeX reads as a command, and signs that its standard fonts have only in formulas.
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≠": r"$\neq$",
    "†": r"$\dagger$",
    "–": "--",
}


# What Markdown reads as emphasis, code, a link, HTML or the end of a cell. Left alone is what it reads as text, so that
# the
# file itself can be read: the underscore of vit_b_16, the brackets of an interval.
_MARKDOWN = re.compile(r"([\\`*<|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:]))")


@dataclass(frozen=True)
class Cell:
    """One cell of a printed table.

    Attributes:
        text: what it says.
        small: said in smaller type behind it, such as an interval.
        bold: set `text` in bold type.
        mark: of a footnote, behind `text`.
    """

    text: str
    small: str = ""
    bold: bool = False
    mark: str = ""

    def markdown(self) -> str:
        """Return the cell as Markdown."""
        text = escape_markdown(self.text)
        text = (f"**{text}**" if self.bold and text else text) + escape_markdown(self.mark)
        return f"{text} {escape_markdown(self.small)}".strip()

    def latex(self) -> str:
        """Return the cell as LaTeX."""
        text = rf"\textbf{{{escape_latex(self.text)}}}" if self.bold and self.text else escape_latex(self.text)
        mark = f"\\textsuperscript{{{escape_latex(self.mark)}}}" if self.mark else ""
        # Braces: a cell that begins with [ would be read as an option of the \\ before it.
        small = f" {{\\scriptsize {escape_latex(self.small)}}}" if self.small else ""
        return (text + mark + small).strip()


@dataclass(frozen=True)
class PrintedTable:
    """A table to be printed.

    Attributes:
        title: heading, or caption.
        columns: head.
        rows: cells, one a column.
        notes: sentences below the table.
        left: number of columns, from the first, that are text and stand at the left.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()
    left: int = 1

    def markdown(self) -> str:
        """Return heading, table and notes as Markdown."""
        lines = [f"### {escape_markdown(self.title)}", ""]
        lines += [_line([escape_markdown(name) for name in self.columns])]
        lines += ["|" + ":--|" * self.left + "--:|" * (len(self.columns) - self.left)]
        lines += [_line([cell.markdown() for cell in row]) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {escape_markdown(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def latex(self, label: str) -> str:
        """Return a `table` environment; it needs the package booktabs.

        Args:
            label: of the table, for `\\ref`.
        """
        lines = [r"\begin{table}", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}"]
        lines += [rf"\caption{{{escape_latex(self.title)}}}", rf"\label{{tab:{label}}}"]
        lines += [rf"\begin{{tabular}}{{{'l' * self.left}{'r' * (len(self.columns) - self.left)}}}", r"\toprule"]
        lines += [" & ".join(escape_latex(name) for name in self.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(cell.latex() for cell in row) + r" \\" for row in self.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
        if self.notes:
            lines += ["", r"\medskip", r"\begin{minipage}{\linewidth}\footnotesize"]
            lines += [rf"{escape_latex(note)}\par" for note in self.notes]
            lines += [r"\end{minipage}"]
        return "\n".join([*lines, r"\end{table}"]) + "\n"


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", text)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
