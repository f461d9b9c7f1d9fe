import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from dualrefnet.cli import app, reports  # noqa: F401 (the module registers the commands)
from dualrefnet.display.format import Cell, PrintedTable, escape_latex, escape_markdown
from dualrefnet.files import write_csv, write_yaml
from dualrefnet.models.registry import METHODS
from dualrefnet.suite import tables
from dualrefnet.suite.results import SuiteResults, aggregate
from dualrefnet.suite.tables import write_tables
from suite_folder import changed, paper_suite, row, write_suite, wrong_on


def page_of(folder: Path) -> str:
    write_tables(folder)
    return (folder / "tables" / "table.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(small, tmp_path_factory.mktemp("written") / "suite")
    names = [path.name for path in write_tables(folder)]
    assert names == ["systems.csv", "comparisons.csv", "table.md", "table.tex"]
    return folder / "tables"


def test_the_page_marks_the_best_and_what_differs(written: Path, small_results: SuiteResults) -> None:
    page = (written / "table.md").read_text(encoding="utf-8")
    assert "# Small & simple: 100% drawn_up" in page
    assert re.search(r"\| DualRefNet \| efficientnet_lite0 \| \*\*0\.958\*\* \[0\.\d{3}, \d\.\d{3}\] \|", page)
    assert re.search(r"\| Concat†? \| efficientnet_lite0 \| 0\.771\\\* \[", page)
    assert "0.771 ± 0.080" in page
    assert "48 images of 24 patients" in page
    systems = pd.read_csv(written / "systems.csv", keep_default_na=False)
    assert systems["pooled"].tolist() == pytest.approx(small_results.systems["pooled"].tolist())
    columns = (
        "dataset protocol method backbone variant measure pooled low high mean sd runs planned folds seeds images "
        "groups paper paper_average difference encoder weights parameters multiply_adds flags"
    )
    assert list(systems.columns) == columns.split()


def test_the_terminal_shows_the_tables_without_escapes_and_with_their_marks(small: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["tables", str(shutil.copytree(small, tmp_path / "suite"))])
    assert shown.exit_code == 0
    assert "\\" not in shown.stdout
    assert "**" not in shown.stdout
    text = " ".join(shown.stdout.split())
    assert re.search(r"Concat† efficientnet_lite0 0\.771\* \[0\.\d{3}, 0\.\d{3}\]", text)
    assert "[95% interval]" in text


def test_latex_is_escaped_and_each_row_has_all_its_columns(written: Path) -> None:
    latex = (written / "table.tex").read_text(encoding="utf-8")
    assert r"\caption{Small \& simple: 100\% drawn\_up (sample, protocol grouped-cv)}" in latex
    assert r"\textbf{0.958} {\scriptsize [" in latex
    assert r"0.771\textsuperscript{*} {\scriptsize [" in latex
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", latex) for word in ("begin", "end"))
    assert sorted(opened) == sorted(closed)
    assert opened.count("table") == 4
    for columns, body in re.findall(r"\\begin{tabular}{([lr]+)}\n\\toprule\n(.*?)\\bottomrule", latex, flags=re.DOTALL):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) >= 2
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    # Everything that isn't in LaTeX's standard fonts was replaced.
    assert latex.isascii()


def test_missing_runs_come_first_and_failed_ones_are_named_before_others(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    lost, cut = (f"sample-{method}-efficientnet_lite0-fold1-seed1" for method in ("concat", "dualrefnet"))
    shutil.rmtree(folder / "runs" / lost)
    (folder / "runs" / cut / "metrics.json").unlink()
    page = page_of(folder)
    assert "INCOMPLETE: 6 of 8 runs are finished" in page.split("###")[1]
    assert "| 3 of 4 |" in page
    assert len(pd.read_csv(folder / "tables" / "missing.csv")) == 2
    systems = pd.read_csv(folder / "tables" / "systems.csv")
    assert row(systems, method="concat", measure="accuracy")["flags"] == "3 of 4 runs; pooled over 2 runs only"
    (folder / "failures").mkdir()
    (folder / "failures" / f"{lost}.json").write_text('{"error": "out of memory"}')
    monkeypatch.setattr(tables, "NAMED", 1)
    first = page_of(folder).split("###")[1]
    assert lost.removeprefix("sample-concat") in first
    assert "out of memory" in first
    assert cut not in first
    assert "and 1 more: missing.csv" in first


def test_a_label_leaking_system_is_marked_and_never_the_best(tmp_path: Path) -> None:
    variants = [
        {"name": "leak", "set": {"metadata.imputation": "label_leaking", "modality_dropout": {}}},
        {"name": "frozen", "set": {"training.encoder": "frozen"}},
    ]
    values = {"rows": "variant", "reference": "frozen", "grid_methods": ["dualrefnet"], "grid_variants": variants}
    suite = changed(**values, grid_folds=[0], grid_seeds=[0])
    page = page_of(write_suite(tmp_path, suite, lambda cell: wrong_on() if cell.key.variant == "leak" else wrong_on(0)))
    assert "| leak (LABEL-LEAKING IMPUTATION) |" in page
    assert "1.000" in page
    assert "**1.000**" not in page


def test_the_paper_s_numbers_are_shown_with_the_leak_and_the_caveats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_table_1: None
) -> None:
    monkeypatch.setattr(METHODS["visual"], "reconstruction", "taps_unknown")
    found = paper_suite(tmp_path, ["dualrefnet", "visual"], ["accuracy", "f1_macro"])
    accuracy = row(found.systems, method="dualrefnet", measure="accuracy")
    assert (accuracy["paper"], accuracy["difference"]) == pytest.approx((0.851, 21 / 24 - 0.851))
    assert np.isnan(row(found.systems, method="dualrefnet", measure="f1_macro")["paper"])
    page = page_of(tmp_path)
    assert "| DualRefNet | vgg13 | 0.851 (+0.024) | – |" in page
    assert "49.3% of the test images show a patient that is also in train (55.4% with validation)" in page
    assert "copied from their publications" in page
    assert "† Visual is reconstructed in part: taps_unknown." in page
    assert "| Visual† |" in page


def test_weighted_numbers_of_table_4_are_shown_and_not_subtracted_from_macro_ones(
    tmp_path: Path, small_table_1: None
) -> None:
    measures = ["accuracy", "f1_macro", "f1_weighted", "mcc"]
    found = paper_suite(tmp_path, ["metablock", "dualrefnet"], measures, table=4)
    cells = [
        row(found.systems, method=method, measure=measure)
        for method in ("metablock", "dualrefnet")
        for measure in ("f1_macro", "f1_weighted")
    ]
    assert [cell["paper"] for cell in cells] == [0.696, 0.696, 0.837, 0.837]
    assert [bool(np.isnan(cell["difference"])) for cell in cells] == [True, False, False, True]
    page = page_of(tmp_path)
    assert "0.696 (weighted average)" in page
    assert "0.837 (macro average)" in page
    assert "No interval is available for: Matthews correlation." in page


@pytest.mark.parametrize("protocol", ["paper", "grouped"])
def test_the_paper_s_numbers_of_another_experiment_are_left_out_and_the_departures_named(
    tmp_path: Path, protocol: str
) -> None:
    block = {"set": {"data.protocol": protocol, "image.size": 64}}
    found = paper_suite(tmp_path, ["dualrefnet"], ["accuracy"], per_class=True, block=block)
    assert found.systems["paper"].isna().all()
    assert found.per_class["paper"].isna().all()
    (system,) = found.members
    expected = {"0 of 1,532 training images", "24 of 383 validation images", "24 of 383 test images"}
    expected |= {"image.size 64, not 224"} | ({"data.protocol grouped, not paper"} if protocol == "grouped" else set())
    assert set(system.departures) == expected
    page = page_of(tmp_path)
    assert all(text in page for text in expected)
    assert "0.851" not in page


def test_classes_have_pooled_values_intervals_and_the_paper_s_numbers(tmp_path: Path, small_table_1: None) -> None:
    found = paper_suite(tmp_path, ["dualrefnet"], ["accuracy"], table="2a", per_class=True)
    sensitivity = row(found.per_class, **{"class": "MEL", "measure": "sensitivity"})
    # Image 2 is one of eight melanomas, and is missed.
    assert (sensitivity["pooled"], sensitivity["images"], sensitivity["paper"]) == (pytest.approx(7 / 8), 8, 0.89)
    assert sensitivity["low"] < 7 / 8 < sensitivity["high"]
    page = page_of(tmp_path)
    assert "0.890 (−0.015)" in page
    assert "the NPVs of ACK, BCC and SCC repeat the specificities" in page
    assert pd.read_csv(tmp_path / "tables" / "per_class.csv").shape[0] == 3 * 6


def test_splits_are_counted_beside_table_1(tmp_path: Path) -> None:
    splits = [{"dataset": "pad_ufes_20", "protocol": name} for name in ("paper", "grouped")]
    write_yaml(tmp_path / "suite.yaml", {"name": "table1", "title": "Table 1", "splits": splits})
    counts = {
        "BCC": (563, 141, 141),
        "SEK": (157, 39, 39),
        "ACK": (486, 122, 122),
        "SCC": (128, 32, 32),
        "NEV": (163, 41, 40),
        "MEL": (35, 8, 10),
    }
    rows = [
        (name, split)
        for name, images in counts.items()
        for split, count in zip(("train", "val", "test"), images, strict=True)
        for _ in range(count)
    ]
    split = pd.DataFrame(rows, columns=["label", "split"])
    write_csv(tmp_path / "splits" / "pad_ufes_20-paper.csv", split.assign(image_id=split.index, patient_id=split.index))
    found = aggregate(tmp_path)
    # One test melanoma more than in the paper.
    unequal = found.splits.loc[found.splits["equal"] == "NO", ["class", "split", "images", "paper"]]
    assert unequal.to_numpy().tolist() == [["MEL", "test", 10, 9]]
    assert (found.splits["equal"] == "yes").sum() == 17
    assert found.missing["cell"].tolist() == ["split pad_ufes_20 grouped"]
    page = page_of(tmp_path)
    files = {path.name for path in (tmp_path / "tables").iterdir()}
    assert files == {"splits.csv", "missing.csv", "table.md", "table.tex"}
    assert "| MEL | 35 (35) | 8 (8) | 10 ≠ (9) |" in page
    assert "| total | 1532 (1532) | 383 (383) | 384 ≠ (383) |" in page


def test_what_markdown_and_latex_read_as_commands_is_escaped() -> None:
    assert escape_latex("a_b & 5% of $3 #1 {x} ~ ^ \\") == (
        r"a\_b \& 5\% of \$3 \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert (
        escape_markdown("a|b *c* _d_ <e> [f](g) [0.1, 0.2] vit_b_16 __g__")
        == r"a\|b \*c\* \_d\_ \<e> [f\](g) [0.1, 0.2] vit_b_16 \_\_g\_\_"
    )
    table = PrintedTable("T|1", ("a", "b"), [[Cell("x_1", mark="†"), Cell("0.5", "[0.4, 0.6]", bold=True)]], ("50% &",))
    assert table.markdown() == "### T\\|1\n\n| a | b |\n|:--|--:|\n| x_1† | **0.5** [0.4, 0.6] |\n\n- 50% &\n"
    assert r"x\_1\textsuperscript{$\dagger$} & \textbf{0.5} {\scriptsize [0.4, 0.6]} \\" in table.latex("one")
