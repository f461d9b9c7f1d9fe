import numpy as np
import pytest

from dualrefnet.display.format import (
    MEASURE_NAMES,
    Cell,
    PrintedTable,
    calibration_line,
    interval,
    listed,
    metrics_tables,
    number,
    percent,
)
from dualrefnet.evaluation.metrics import HEADLINE_MEASURES, metrics_from_confusion


def test_numbers_have_a_real_minus_sign_and_undefined_ones_are_a_dash() -> None:
    assert [number(-0.5), number(None), number(np.nan), number(0.125, "+.1%")] == ["−0.500", "–", "–", "+12.5%"]
    assert [interval(-1, 2.5), interval(None, None), interval(np.nan, np.nan)] == ["[−1.00, 2.50]", "", ""]
    assert percent({"auc": 0.5, "auc_ci95": [0.25, 1]}, "auc") == "50% [25%, 100%]"
    assert percent({"auc": None}, "auc") == "–"
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_tables_show_the_measures_with_their_intervals(level: float) -> None:
    classes = ["[bold]A", "B|b"]
    metrics = metrics_from_confusion([[3, 0], [2, 0]], classes, ["B|b"])
    headline, by_class = metrics_tables(metrics)
    assert not any(row[2].text for row in headline.rows)
    assert "log loss" not in headline.markdown()
    assert r"| B\|b | 0.000 | 1.000 | – |" in by_class.markdown()
    assert any("never predicted" in note for note in by_class.notes)
    drawn = {"bootstrap": {"level": level}, f"accuracy_ci{100 * level:g}": [0.2, 0.9]}
    headline, _ = metrics_tables({**metrics, **drawn}, "Run 1")
    assert (headline.title, headline.columns[2]) == ("Run 1", f"{100 * level:g}% interval")
    assert ["accuracy", "0.600", "[0.200, 0.900]"] in [[cell.text for cell in row] for row in headline.rows]


def test_one_table_is_markdown_and_latex() -> None:
    table = PrintedTable("A_b", ("x", "y"), [[Cell("a|b", mark="*"), Cell.estimate(0.5, 0.25, 0.75)]], ("50% & more",))
    assert table.markdown() == "### A_b\n\n| x | y |\n|:--|--:|\n| a\\|b\\* | 0.500 [0.25, 0.75] |\n\n- 50% & more\n"
    latex = table.latex("t")
    assert r"a$|$b\textsuperscript{*} & 0.500 {\scriptsize [0.25, 0.75]} \\" in latex
    assert r"50\% \& more\par" in latex


def test_rows_and_columns_of_dashes_are_left_out_and_named() -> None:
    cells = [
        [Cell("a"), Cell("1"), Cell("–")],
        [Cell("b"), Cell("–"), Cell("–")],
        [Cell("c"), Cell("–", "[0, 1]"), Cell("")],
    ]
    found = PrintedTable("t", ("x", "y", "z"), cells, ("note.",)).defined()
    assert found.columns == ("x", "y")
    assert [row[0].text for row in found.rows] == ["a", "c"]
    assert found.notes == ("note.", "Undefined: b.")


def test_every_headline_measure_has_a_name_for_people() -> None:
    assert set(HEADLINE_MEASURES) <= set(MEASURE_NAMES)


def test_the_line_of_the_terminal_says_what_was_measured() -> None:
    measured = {
        "temperature": 1.246,
        "before": {"ece": 0.1234},
        "after": {"ece": 0.0567},
        "conformal": {"promised": 0.9, "marginal": {"mean_size": 1.76, "coverage": 0.875}},
        "referral": {"sensitivity": 0.931, "referred": 0.52, "wanted": 0.95},
    }
    line = calibration_line(measured)
    for text in ("1.25", "0.123", "0.057", "1.8", "88%", "90%", "52%", "93%", "95%"):
        assert text in line
    assert calibration_line(measured | {"referral": None}) == line.rpartition("; ")[0]
