import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dualrefnet.display.format import Cell as TableCell
from dualrefnet.display.format import PrintedTable, escape_latex, escape_markdown
from dualrefnet.errors import RunError
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.models.registry import METHODS
from dualrefnet.suite import tables
from dualrefnet.suite.grid import expand, load_suite
from dualrefnet.suite.results import aggregate
from dualrefnet.suite.tables import write_tables
from suite_folder import IMAGES, SUITE, changed, paper_suite, planned, row, write_run, write_suite, wrong_on


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite; don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite") / "small", SUITE)


def test_a_missing_run_is_said_and_the_complete_seed_is_pooled(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    lost, failed = "sample-concat-efficientnet_lite0-fold1-seed1", "sample-dualrefnet-efficientnet_lite0-fold0-seed0"
    shutil.rmtree(folder / "runs" / lost)
    (folder / "runs" / failed / "metrics.json").unlink()
    write_json(folder / "failures" / f"{failed}.json", {"error": "out of memory_", "kind": "RuntimeError", "log": ""})
    found = aggregate(folder)
    assert found.collection.missing.set_index("cell")[["state", "error"]].T.to_dict("list") == {
        failed: ["failed", "out of memory_"],
        lost: ["not started", ""],
    }
    concat = row(found.systems, method="concat", measure="accuracy")
    assert (concat["runs"], concat["planned"]) == (3, 4)
    assert concat["flags"] == "3 of 4 runs; pooled over 2 runs only"
    assert concat["pooled"] == pytest.approx(38 / 48)
    assert concat["mean"] == pytest.approx(np.mean([18, 16, 20]) / 24)
    # Of the reference seed 1 is complete; both are measured on the same 48 images.
    assert row(found.comparisons, measure="accuracy")["difference"] == pytest.approx(38 / 48 - 45 / 48)
    write_tables(folder)
    page = (folder / "tables" / "table.md").read_text(encoding="utf-8")
    assert "INCOMPLETE: 6 of 8 runs are finished" in page
    assert escape_markdown("out of memory_") in page
    assert escape_markdown(lost) in page
    assert "| 3 of 4 |" in page
    assert len(pd.read_csv(folder / "tables" / "missing.csv")) == 2
    monkeypatch.setattr(tables, "NAMED", 1)
    write_tables(folder)
    page = (folder / "tables" / "table.md").read_text(encoding="utf-8")
    assert failed in page
    assert escape_markdown(lost) not in page.split("###")[1], "what failed is named before what was never started"
    assert "and 1 more: missing.csv" in page


def test_a_system_without_any_run_keeps_its_row(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    for run in (folder / "runs").glob("sample-concat-*"):
        shutil.rmtree(run)
    found = aggregate(folder)
    concat = row(found.systems, method="concat", measure="accuracy")
    assert np.isnan([concat["pooled"], concat["mean"], concat["low"]]).all()
    assert concat["flags"] == "0 of 4 runs"
    assert row(found.comparisons, measure="accuracy")["note"] == "not compared: it has no pooled value"
    write_tables(folder)
    assert re.search(
        r"\| Concat†? \| efficientnet_lite0 \| – \| – \| 0 of 4 \|",
        (folder / "tables" / "table.md").read_text(encoding="utf-8"),
    )


def test_systems_tested_on_other_images_are_not_compared(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    for cell in expand(load_suite(folder / "suite.yaml")):
        if cell.method == "concat" and cell.fold == 1:
            write_run(
                folder / "runs" / cell.run, cell, planned(cell), ids=[f"other-{index:02}" for index in range(IMAGES)]
            )
    found = aggregate(folder)
    assert found.comparisons["note"].unique().tolist() == ["not compared: the reference was tested on other images"]
    assert found.comparisons[["difference", "p", "p_holm"]].isna().all(axis=None)
    assert row(found.systems, method="concat", measure="accuracy")["pooled"] == pytest.approx(37 / 48)
    write_tables(folder)
    assert "not compared: the reference was tested on other images" in (folder / "tables" / "table.md").read_text(
        encoding="utf-8"
    )


def test_flags_say_what_spoils_a_number(tmp_path: Path) -> None:
    variants = [
        {"name": "leak", "set": {"metadata.imputation": "label_leaking", "modality_dropout": {}}},
        {"name": "frozen", "set": {"training.encoder": "frozen"}},
    ]
    suite = changed(
        grid_methods=["dualrefnet"],
        grid_folds=[0],
        grid_seeds=[0],
        grid_variants=variants,
        rows="variant",
        reference="frozen",
    )
    folder = write_suite(
        tmp_path, suite, lambda cell: wrong_on() if cell.variant == "leak" else wrong_on(0), weights="none", drawn=True
    )
    found = aggregate(folder)
    leak, frozen = (row(found.systems, variant=name, measure="accuracy") for name in ("leak", "frozen"))
    assert leak["flags"].startswith("LABEL-LEAKING IMPUTATION")
    assert frozen["flags"] == "drawn data, not clinical; frozen encoder; encoder from random weights"
    assert frozen["encoder"] == "frozen"
    write_tables(folder)
    page = (folder / "tables" / "table.md").read_text(encoding="utf-8")
    assert "Frozen encoder: what it makes of every image was computed once" in page
    assert "| leak (LABEL-LEAKING IMPUTATION) |" in page
    # The leaking row is the best one, and is not set in bold.
    assert "**1.000**" not in page
    assert found.comparisons["reference"].unique().tolist() == ["dualrefnet efficientnet_lite0 frozen"]


def test_the_papers_numbers_stand_beside_ours_with_the_leak_and_the_caveats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["visual"], "reconstruction", "taps_unknown")
    found = paper_suite(tmp_path)
    accuracy = row(found.systems, method="dualrefnet", measure="accuracy")
    assert (accuracy["paper"], accuracy["difference"]) == pytest.approx((0.851, 21 / 24 - 0.851))
    assert np.isnan(row(found.systems, method="dualrefnet", measure="f1_macro")["paper"])
    assert accuracy["flags"] == "leaking split: the same patients or lesions in training and test"
    write_tables(tmp_path)
    page = (tmp_path / "tables" / "table.md").read_text(encoding="utf-8")
    assert "| DualRefNet | vgg13 | 0.851 (+0.024) | – |" in page
    assert "LEAK: 49.3% of the test images show a patient that is also in train (55.4% with validation)" in page
    assert "copied from their publications" in page
    assert "† Visual is reconstructed in part: taps_unknown." in page
    assert "| Visual† |" in page


def test_weighted_numbers_of_table_4_are_shown_and_not_subtracted_from_macro_ones(tmp_path: Path) -> None:
    found = paper_suite(
        tmp_path, table=4, measures=["accuracy", "f1_macro", "f1_weighted", "mcc"], methods=["metablock", "dualrefnet"]
    )
    cells = {
        (key, measure): row(found.systems, method=key, measure=measure)
        for key in ("metablock", "dualrefnet")
        for measure in ("f1_macro", "f1_weighted")
    }
    assert [cell["paper"] for cell in cells.values()] == [0.696, 0.696, 0.837, 0.837]
    assert [bool(np.isnan(cell["difference"])) for cell in cells.values()] == [True, False, False, True]
    write_tables(tmp_path)
    page = (tmp_path / "tables" / "table.md").read_text(encoding="utf-8")
    assert "0.696 (weighted average)" in page
    assert "0.837 (macro average)" in page
    assert "Table 4 mixes averages" in page
    weighted = row(found.systems, method="dualrefnet", measure="f1_weighted")
    assert weighted["low"] < weighted["pooled"] < weighted["high"]
    assert "No interval is drawn of: Matthews correlation." in page


def test_classes_have_pooled_values_intervals_and_the_papers_numbers(tmp_path: Path) -> None:
    found = paper_suite(tmp_path, table="2a", per_class=True, methods=["dualrefnet"])
    sensitivity = row(found.per_class, **{"class": "MEL", "measure": "sensitivity"})
    # Image 2 is one of eight melanomas, and is missed.
    assert (sensitivity["pooled"], sensitivity["images"], sensitivity["paper"]) == (pytest.approx(7 / 8), 8, 0.89)
    assert sensitivity["low"] < 7 / 8 < sensitivity["high"]
    write_tables(tmp_path)
    page = (tmp_path / "tables" / "table.md").read_text(encoding="utf-8")
    assert "0.890 (−0.015)" in page
    assert "the NPVs of ACK, BCC and SCC repeat the specificities" in page
    assert pd.read_csv(tmp_path / "tables" / "per_class.csv").shape[0] == 3 * 6


def test_splits_are_counted_beside_table_1(tmp_path: Path) -> None:
    suite = {
        "name": "table1",
        "title": "Table 1",
        "splits": [{"dataset": "pad_ufes_20", "protocol": name} for name in ("paper", "grouped")],
    }
    write_yaml(tmp_path / "suite.yaml", suite)
    reported = {
        "BCC": (563, 141, 141),
        "SEK": (157, 39, 39),
        "ACK": (486, 122, 122),
        "SCC": (128, 32, 32),
        "NEV": (163, 41, 40),
        "MEL": (35, 8, 10),
    }
    rows = [
        (name, side)
        for name, counts in reported.items()
        for side, count in zip(("train", "val", "test"), counts, strict=True)
        for _ in range(count)
    ]
    split = pd.DataFrame(rows, columns=["label", "split"]).assign(
        image_id=range(len(rows)), patient_id=range(len(rows))
    )
    write_csv(tmp_path / "splits" / "pad_ufes_20-paper.csv", split)
    found = aggregate(tmp_path)
    # One test melanoma more than in the paper.
    assert found.splits.loc[
        found.splits["equal"] == "NO", ["class", "split", "images", "paper"]
    ].to_numpy().tolist() == [["MEL", "test", 10, 9]]
    assert (found.splits["equal"] == "yes").sum() == 17
    assert found.collection.missing["cell"].tolist() == ["split pad_ufes_20 grouped"]
    assert [path.name for path in write_tables(tmp_path)] == ["splits.csv", "missing.csv", "table.md", "table.tex"]
    page = (tmp_path / "tables" / "table.md").read_text(encoding="utf-8")
    assert "| MEL | 35 (35) | 8 (8) | 10 ≠ (9) |" in page
    assert "| total | 1532 (1532) | 383 (383) | 384 ≠ (383) |" in page
    assert "1 of 18 counts are NOT those of Table 1" in page


def test_the_page_marks_the_best_and_what_differs(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    written = write_tables(folder)
    assert [path.name for path in written] == ["systems.csv", "comparisons.csv", "table.md", "table.tex"]
    page = (folder / "tables" / "table.md").read_text(encoding="utf-8")
    assert "# Small & simple: 100% drawn_up" in page
    assert re.search(r"\| DualRefNet \| efficientnet_lite0 \| \*\*0\.958\*\* \[0\.\d{3}, \d\.\d{3}\] \|", page)
    assert re.search(r"\| Concat†? \| efficientnet_lite0 \| 0\.771\\\* \[", page)
    assert "0.771 ± 0.080" in page
    assert "48 images of 24 patients" in page
    assert "No test image shows a patient of train or validation" in page
    systems = pd.read_csv(folder / "tables" / "systems.csv")
    assert systems["pooled"].tolist() == pytest.approx(aggregate(folder).systems["pooled"].tolist())


def test_latex_is_escaped_and_each_row_has_all_its_columns(small: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small, tmp_path / "suite")
    write_tables(folder)
    latex = (folder / "tables" / "table.tex").read_text(encoding="utf-8")
    assert r"\caption{Small \& simple: 100\% drawn\_up (sample, protocol grouped-cv)}" in latex
    assert r"\textbf{0.958} {\scriptsize [" in latex
    assert r"0.771\textsuperscript{*} {\scriptsize [" in latex
    assert r"0.771 $\pm$ 0.080" in latex
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", latex) for word in ("begin", "end"))
    assert sorted(opened) == sorted(closed)
    assert opened.count("table") == 4
    for columns, body in re.findall(r"\\begin{tabular}{([lr]+)}\n\\toprule\n(.*?)\\bottomrule", latex, flags=re.DOTALL):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) >= 2
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert re.sub(r"\\[{}]", "", latex).count("{") == re.sub(r"\\[{}]", "", latex).count("}")
    # Everything that isn't in LaTeX's standard fonts was replaced.
    assert latex.isascii()


def test_latex_compiles(small: Path, tmp_path: Path) -> None:
    program = shutil.which("pdflatex")
    if not program:
        pytest.skip("there is no pdflatex")
    folder = shutil.copytree(small, tmp_path / "suite")
    write_tables(folder)
    lines = [
        r"\documentclass{article}\usepackage{booktabs}\begin{document}",
        r"\input{tables/table.tex}",
        r"\end{document}",
    ]
    (folder / "page.tex").write_text("\n".join(lines), encoding="utf-8")
    result = subprocess.run(
        [program, "-interaction=nonstopmode", "-halt-on-error", "page.tex"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:]


def test_escapes_undo_every_special_sign() -> None:
    assert escape_latex("a_b & 5% of $3 #1 {x} ~ ^ \\") == (
        r"a\_b \& 5\% of \$3 \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}"
    )
    assert (
        escape_markdown("a|b *c* _d_ <e> [f](g) [0.1, 0.2] vit_b_16 __g__")
        == r"a\|b \*c\* \_d\_ \<e> [f\](g) [0.1, 0.2] vit_b_16 \_\_g\_\_"
    )
    table = PrintedTable(
        "T|1", ("a", "b"), [[TableCell("x_1", mark="†"), TableCell("0.5", "[0.4, 0.6]", bold=True)]], ("50% & more",)
    )
    assert table.markdown() == "### T\\|1\n\n| a | b |\n|:--|--:|\n| x_1† | **0.5** [0.4, 0.6] |\n\n- 50% & more\n"
    assert r"x\_1\textsuperscript{$\dagger$} & \textbf{0.5} {\scriptsize [0.4, 0.6]} \\" in table.latex("one")
    assert r"50\% \& more\par" in table.latex("one")


def test_what_is_no_suite_and_unknown_measures_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no suite\.yaml"):
        write_tables(tmp_path)
    folder = shutil.copytree(small, tmp_path / "suite")
    write_yaml(folder / "suite.yaml", changed(measures=["bacc"]))
    with pytest.raises(
        RunError, match=r"suite\.yaml: no measure is called 'bacc'; correct `measures`; there are: accuracy, "
    ):
        write_tables(folder)
