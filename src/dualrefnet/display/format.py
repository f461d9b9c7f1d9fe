"""How results are written: numbers, intervals, tables (Markdown, LaTeX; HTML by the page) and one-line summaries.

Numbers have three decimals and a real minus sign, intervals two and brackets; what is undefined is a dash. Values come
as metrics.json holds them, the 95% interval of `auc` as `auc_ci95`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dualrefnet.runtime.availability import ALWAYS_RECORDED, AS_RECORDED, IMAGE_ONLY, METADATA_ONLY

if TYPE_CHECKING:
    import pandas as pd

Values = Mapping[str, Any]

UNDEFINED = "–"

MEASURE_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc_macro_ovr": "AUC, macro, one versus rest",
    "auc_weighted_ovr": "AUC, weighted, one versus rest",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "precision_macro": "precision, macro",
    "precision_weighted": "precision, weighted",
    "recall_macro": "recall, macro",
    "recall_weighted": "recall, weighted",
    "specificity_macro": "specificity, macro",
    "npv_macro": "NPV, macro",
    "kappa": "Cohen's kappa",
    "mcc": "Matthews correlation",
    "ece": "expected calibration error",
    "brier": "Brier score, multi-class",
    "log_loss": "log loss",
    "support": "images",
    "malignant_sensitivity": "malignant: sensitivity",
    "malignant_specificity": "malignant: specificity",
    "malignant_ppv": "malignant: PPV",
    "malignant_npv": "malignant: NPV",
    "malignant_auc": "malignant: AUC",
    "malignant_support": "malignant: images",
}
CLASS_COLUMNS = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "auc": "AUC",
    "support": "images",
}
COST_COLUMNS = ("parameters (M)", "multiply-adds (G)")
AVAILABILITY_COLUMNS = {
    "balanced_accuracy": "balanced accuracy",
    "malignant_auc": "malignant AUC",
    "cancers_referred": "cancers referred",
    "benign_referred": "benign referred",
    "coverage": "coverage of the sets",
    "mean_size": "classes in a set",
}
AVAILABILITY_NAMES = {
    AS_RECORDED: "all that was recorded",
    ALWAYS_RECORDED: "image, only what is always recorded",
    IMAGE_ONLY: "image, metadata blank",
    METADATA_ONLY: "metadata, no image",
}


def number(value: float | None, form: str = ".3f") -> str:
    return UNDEFINED if value is None or math.isnan(value) else format(value, form).replace("-", "−")


def millions(value: float | None) -> str:
    return number(None if value is None else value / 1e6, ".2f")


def billions(value: float | None) -> str:
    return number(None if value is None else value / 1e9, ".2f")


def interval(low: float | None, high: float | None, form: str = ".2f") -> str:
    return "" if low is None or math.isnan(low) else f"[{low:{form}}, {high:{form}}]".replace("-", "−")


def estimate(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    return f"{number(value, form)} {interval(low, high, form)}".strip()


def interval_of(values: Values, key: str, form: str = ".2f", level: float = 0.95) -> str:
    low, high = values.get(f"{key}_ci{100 * level:g}") or (None, None)
    return interval(low, high, form)


def percent(values: Values, key: str) -> str:
    low, high = values.get(f"{key}_ci95") or (None, None)
    return estimate(values[key], low, high, ".0%")


def listed(names: Sequence[str]) -> str:
    """Return names within a sentence: `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def protocol_name(protocol: str, unit: str = "group") -> str:
    """Return a protocol in words; `unit` (`patient`, `lesion`, `image`; `group`: unknown) must not cross the split."""
    names = {
        "paper": "the paper's split",
        "grouped": f"{unit}-disjoint split" if unit != "image" else "split by image",
        "grouped-cv": f"{unit}-disjoint cross-validation" if unit != "image" else "cross-validation by image",
        "cross-fitted": f"{unit}-disjoint cross-fitting" if unit != "image" else "cross-fitting by image",
        "all": f"all {unit}s, none for a test",
        "own": "the user's own split",
    }
    return names.get(protocol, protocol)


def sentence(text: str) -> str:
    """Return a note of metrics.json, which has neither capital nor full stop, as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


# What LaTeX reads as a command, and signs that its standard fonts have only in formulas.
_LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {sign: f"${sign}$" for sign in "<>|"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    | {"±": r"$\pm$", "−": "$-$", "×": r"$\times$", "≠": r"$\neq$", "†": r"$\dagger$"}
)
# What Markdown reads as emphasis, code, a link, HTML or the end of a cell. Left alone is what it reads as text, so that
# the file itself can be read: the underscore of vit_b_16, the brackets of an interval.
_MARKDOWN = re.compile(r"([\\`*<|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:]))")


def escape_latex(text: str) -> str:
    return text.translate(_LATEX)


def escape_markdown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    small: str = ""
    bold: bool = False
    mark: str = ""

    @property
    def undefined(self) -> bool:
        return self.text in ("", UNDEFINED) and not self.small

    @classmethod
    def estimate(
        cls,
        value: float | None,
        low: float | None = None,
        high: float | None = None,
        form: str = ".3f",
        bounds: str = ".2f",
    ) -> Cell:
        return cls(number(value, form), interval(low, high, bounds))

    @classmethod
    def of(cls, values: Values, key: str, form: str = ".3f", bounds: str = ".2f") -> Cell:
        return cls(number(values.get(key), form), interval_of(values, key, bounds))

    def markdown(self) -> str:
        text = escape_markdown(self.text)
        text = (f"**{text}**" if self.bold and text else text) + escape_markdown(self.mark)
        return f"{text} {escape_markdown(self.small)}".strip()

    def latex(self) -> str:
        text = rf"\textbf{{{escape_latex(self.text)}}}" if self.bold and self.text else escape_latex(self.text)
        mark = f"\\textsuperscript{{{escape_latex(self.mark)}}}" if self.mark else ""
        # Braces: a cell that begins with [ would be read as an option of the \\ before it.
        small = f" {{\\scriptsize {escape_latex(self.small)}}}" if self.small else ""
        return (text + mark + small).strip()


@dataclass(frozen=True)
class PrintedTable:
    """A table to be printed."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    notes: tuple[str, ...] = ()
    left: int = 1

    def defined(self) -> PrintedTable:
        """Return the table without rows and columns that hold nothing but dashes; a note names the rows."""
        kept: list[list[Cell]] = []
        empty: list[list[Cell]] = []
        for row in self.rows:
            undefined = len(row) > 1 and all(cell.undefined for cell in row[1:])
            (empty if undefined else kept).append(row)
        used = [
            place
            for place in range(len(self.columns))
            if place < self.left or not kept or not all(row[place].undefined for row in kept)
        ]
        notes = (*self.notes, f"Undefined: {', '.join(row[0].text for row in empty)}.") if empty else self.notes
        columns = tuple(self.columns[place] for place in used)
        return replace(self, columns=columns, rows=[[row[place] for place in used] for row in kept], notes=notes)

    def markdown(self, heading: bool = True) -> str:
        lines = [f"### {escape_markdown(self.title)}", ""] if heading else []
        lines += [_row([escape_markdown(name) for name in self.columns])]
        lines += ["|" + ":--|" * self.left + "--:|" * (len(self.columns) - self.left)]
        lines += [_row([cell.markdown() for cell in row]) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {escape_markdown(note)}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def latex(self, label: str) -> str:
        """Return a `table` environment with that label for `\\ref`; it needs the package booktabs."""
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


SIGNIFICANT = 0.05


def p_value(p: float) -> str:
    """Return a corrected p with its sign of equality; empty if there is none."""
    return "" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def class_difference_table(rows: pd.DataFrame, names: tuple[str, str], title: str, family: int) -> PrintedTable:
    """Return how far a system is above another in each class; p is corrected for `family` comparisons."""
    measures = list(dict.fromkeys(rows["measure"]))
    lines = []
    for name, group in rows.groupby("class", sort=False):
        found = group.set_index("measure").to_dict("index")
        line = [Cell(str(name)), Cell(f"{group['images'].iloc[0]:,}")]
        for measure in measures:
            one = found[measure]
            small = f"{interval(one['low'], one['high'], '.3f')} {p_value(one['p_holm'])}".strip()
            line += [Cell(number(one["value"])), Cell(number(one["reference_value"]))]
            line.append(Cell(number(one["difference"], "+.3f"), small, bold=one["p_holm"] < SIGNIFICANT))
        lines.append(line)
    notes = [
        f"Difference [95% interval of the paired bootstrap]; p after Holm's correction for {family} comparisons per "
        "measure. Bold: p < .05."
    ]
    for measure in measures:
        differs = rows[(rows["measure"] == measure) & (rows["p_holm"] < SIGNIFICANT)]
        higher, lower = (differs[differs["difference"] * sign > 0]["class"].tolist() for sign in (1, -1))
        word = CLASS_COLUMNS[measure]
        verdict = f"higher in {listed(higher) or 'no class'}, lower in {listed(lower) or 'no class'}"
        notes.append(f"{word[0].upper()}{word[1:]} of {names[0]} is significantly {verdict} than that of {names[1]}.")
    columns = [text for measure in measures for text in (CLASS_COLUMNS[measure], names[1], "difference")]
    return PrintedTable(title, ("class", "images", *columns), lines, tuple(notes))


def text_rows(rows: Iterable[Sequence[object]]) -> list[list[Cell]]:
    return [[Cell(str(value)) for value in row] for row in rows]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def metrics_tables(metrics: Values, title: str = "Test set", counted: str = "images") -> list[PrintedTable]:
    """Return the headline measures and those of each class; `counted` is what they are measured on."""
    level = metrics.get("bootstrap", {}).get("level", 0.95)

    def cell(values: Values, key: str) -> Cell:
        form = ".0f" if key == "support" else ".3f"
        return Cell(number(values.get(key), form), interval_of(values, key, ".3f", level))

    malignant = {f"malignant_{key}": key for key in metrics.get("malignant", {})}
    rows = []
    for key, name in MEASURE_NAMES.items():
        if key in metrics or key in malignant:
            found = cell(metrics, key) if key in metrics else cell(metrics["malignant"], malignant[key])
            rows.append([Cell(name.replace("images", counted)), Cell(found.text), Cell(found.small)])
    by_class = [
        [Cell(name), *(cell(values, key) for key in CLASS_COLUMNS)] for name, values in metrics["per_class"].items()
    ]
    columns = [name.replace("images", counted) for name in CLASS_COLUMNS.values()]
    name = f"{100 * level:g}% interval"
    below = f", with the {name}" if "bootstrap" in metrics else ""
    notes = tuple(f"Note: {note}." for note in metrics["remarks"])
    return [
        PrintedTable(title, ("measure", "value", name), rows),
        PrintedTable(f"Each class versus the rest{below}", ("class", *columns), by_class, notes),
    ]


def availability_table(measured: Values) -> PrintedTable:
    """Return what the measures are when less is given."""
    given = {AVAILABILITY_NAMES[name]: values for name, values in measured["inputs"].items()}
    if len(measured["groups"]) > 1:
        given |= {group["name"]: group for group in measured["groups"] if group["group"]["to"] > 0}
    rows = []
    for name, values in given.items():
        cells = [Cell.of(values, key, ".1f" if key == "mean_size" else ".3f") for key in AVAILABILITY_COLUMNS]
        rows.append([Cell(name), *cells])
    notes = [
        "The same test images. Sets and referral use the thresholds fitted on the validation split for these inputs.",
        "Rows by share of fields: the remaining fields were drawn independently of the class; cases with too few "
        "recorded fields are left out.",
    ]
    weak: dict[str, list[str]] = {}
    for group in measured["groups"]:
        few = ["too few validation cancers for a referral threshold, so all are referred"]
        for note in (*group["remarks"], *few * (group["referral_threshold"] == 0)):
            weak.setdefault(note, []).append(group["name"])
    notes += [f"{sentence(note)[:-1]}: {'; '.join(names)}." for note, names in weak.items()]
    return PrintedTable("Missing inputs", ("given", *AVAILABILITY_COLUMNS.values()), rows, tuple(notes))


def availability_line(measured: Values) -> str:
    """Return which cancers are referred when metadata or the image are missing; empty if that was not measured."""
    parts = [
        f"{AVAILABILITY_NAMES[name]} {values['cancers_referred']:.0%} (benign {values['benign_referred']:.0%})"
        for name, values in measured["inputs"].items()
        if values.get("cancers_referred") is not None and values.get("benign_referred") is not None
    ]
    return f"cancers referred: {'; '.join(parts)}" if parts else ""


def folds_line(folds: Values) -> str:
    """Return how much the measures differ between the folds of a cross-fitted run."""
    names = ("balanced_accuracy", "auc_macro_ovr", "accuracy")
    parts = [
        f"{MEASURE_NAMES[name]} {number(folds[name]['mean'], '.3f')} (sd {number(folds[name]['sd'], '.3f')})"
        for name in names
    ]
    return f"mean over {folds['count']} folds: {'; '.join(parts)}"


def deployed_line(deployed: Values) -> str:
    """Return what sets, referral and out-of-distribution score of a model give on an external test set."""
    names = {
        "coverage": "coverage of the conformal sets",
        "cancers_referred": "cancers referred",
        "benign_referred": "benign referred",
        "out_of_scope": "out-of-distribution warnings",
    }
    return "; ".join(f"{text} {percent(deployed, key)}" for key, text in names.items() if deployed.get(key) is not None)


def calibration_line(calibrated: Values) -> str:
    """Return what temperature, conformal sets and referral achieve on the test split."""
    sets, referral = calibrated["conformal"]["marginal"], calibrated["referral"]
    before, after = calibrated["before"]["ece"], calibrated["after"]["ece"]
    parts = [
        f"temperature {calibrated['temperature']:.2f}: expected calibration error {before:.3f} -> {after:.3f}",
        f"conformal sets of {sets['mean_size']:.1f} classes: coverage {sets['coverage']:.0%} "
        f"(target {calibrated['conformal']['promised']:.0%})",
    ]
    if referral is not None and referral["sensitivity"] is not None:
        parts.append(
            f"referral of {referral['referred']:.0%}: sensitivity {referral['sensitivity']:.0%} "
            f"(target {referral['wanted']:.0%})"
        )
    return "; ".join(parts)
