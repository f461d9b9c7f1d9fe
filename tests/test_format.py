import numpy as np

from dualrefnet.display.format import MEASURE_NAMES, calibration_line, metrics_tables
from dualrefnet.evaluation.comparison import bootstrap_intervals, with_intervals
from dualrefnet.evaluation.metrics import HEADLINE_MEASURES, compute_metrics, metrics_from_confusion
from resampling import predictions


def test_tables_show_the_measures_with_their_intervals() -> None:
    classes = ["[bold]A", "B|b", "malignant"]
    labels, scores = predictions(1, 60)
    plain = compute_metrics(labels, scores, classes, malignant=["malignant"])
    drawn = bootstrap_intervals(labels, scores, np.arange(60), classes, 50, malignant=["malignant"], level=0.9)
    full = with_intervals(plain, drawn)
    low, high = full["accuracy_ci90"]
    headline, by_class = metrics_tables(full, "Run 1")
    assert headline.columns == ("measure", "value", "90% interval")
    row = next(row for row in headline.rows if row[0].text == "accuracy")
    assert [cell.text for cell in row[1:]] == [f"{full['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]"]
    assert r"| B\|b |" in by_class.markdown()
    assert not any(row[2].text for row in metrics_tables(plain)[0].rows)

    undefined = metrics_from_confusion([[3, 0], [2, 0]], ["A", "B"])
    headline, by_class = metrics_tables(undefined)
    assert "| B | 0.000 | 1.000 | – |" in by_class.markdown()
    assert any("B never predicted" in note for note in by_class.notes)
    assert "log loss" not in headline.markdown()


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
