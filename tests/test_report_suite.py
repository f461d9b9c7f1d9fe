import html
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray

from dualrefnet.analysis.cases import find_disagreement
from dualrefnet.data.adapters import load_dataset
from dualrefnet.errors import RecipeError, RunError
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.report.suite_report import (
    CASES,
    MEANINGS,
    choose_pairs,
    draw_cases,
    glance_section,
    suite_notes,
    write_suite_report,
)
from dualrefnet.suite.grid import Cell, expand, load_suite
from dualrefnet.suite.results import LABEL_LEAKING, Aggregate, aggregate
from dualrefnet.suite.tables import printed_tables
from suite_folder import changed, paper_suite, row, write_suite, wrong_on

# DualRefNet errs on 2 of 24 images, Concat on 2 others, the image-only baseline on 16.
WRONG = {"dualrefnet": (0, 5), "concat": (2, 3), "no_metadata": tuple(range(4, 20))}
THREE = changed(grid_methods=list(WRONG), grid_folds=[0], grid_seeds=[0, 1], per_class=True)


def answers(cell: Cell) -> NDArray[np.int64]:
    return wrong_on(*WRONG[cell.method])


def words(page: Path) -> str:
    """Return what a reader sees of a page, pictures left out."""
    text = re.sub(r"<style.*?</style>|<svg.*?</svg>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def sentences(found: Aggregate, folder: Path) -> str:
    return " ".join(glance_section(found, folder).intro)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite of three systems; don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite") / "three", THREE, answers)


@pytest.fixture(scope="module")
def page(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its page, without photographs."""
    return write_suite_report(three, tmp_path_factory.mktemp("out"), photographs=False, samples=200)


def test_the_first_sentences_are_those_of_the_numbers(three: Path, page: Path) -> None:
    found, said = aggregate(three, 200), words(page)
    values = {method: row(found.systems, method=method, measure="accuracy") for method in WRONG}
    rivals = {method: row(found.comparisons, method=method, measure="accuracy") for method in ("concat", "no_metadata")}
    assert values["dualrefnet"]["pooled"] == values["concat"]["pooled"] == pytest.approx(22 / 24)
    assert (rivals["no_metadata"]["p_holm"], rivals["concat"]["p_holm"]) == (pytest.approx(2 / 201 * 2), 1)
    low, high = values["dualrefnet"]["low"], values["dualrefnet"]["high"]
    assert "3 systems are compared; 6 of 6 runs are finished." in said
    assert "patients apart, in folds: tested on 24 images of 12 patients." in said
    assert f"The reference in accuracy: DualRefNet with 0.917 [{low:.3f} to {high:.3f}]." in said
    assert (
        "In accuracy, of 2 systems compared with the reference, 1 is worse by 0.583: No metadata; none is better."
        in said
    )
    assert (
        "The other one can't be told from the reference with these data, which doesn't mean that there is no difference: Concat."
        in said
    )
    assert "A difference counts where p < 0.05 after Holm's correction for 2 comparisons." in said


def test_where_no_difference_is_shown_none_is_claimed(tmp_path: Path) -> None:
    folder = write_suite(
        tmp_path, THREE, lambda cell: wrong_on({"dualrefnet": 0, "concat": 1, "no_metadata": 2}[cell.method])
    )
    said = sentences(aggregate(folder, 200), folder)
    assert "Each of the 2 systems compared can't be told from the reference with these data" in said
    assert "worse" not in said
    assert "better" not in said


def test_less_is_better_of_some_measures_and_some_have_no_interval(three: Path, tmp_path: Path) -> None:
    found = aggregate(three, 200)
    # The same numbers, had they been errors.
    suite = found.collection.suite.model_copy(update={"measures": ("ece",)})
    tables = [
        table[table["measure"] == "accuracy"].assign(measure="ece") for table in (found.systems, found.comparisons)
    ]
    errors = replace(found, collection=replace(found.collection, suite=suite), systems=tables[0], comparisons=tables[1])
    said = sentences(errors, three)
    assert (
        "In expected calibration error, of 2 systems compared with the reference, none is worse; 1 is better by 0.583: No metadata"
        in said
    )
    assert "The lowest expected calibration error is that of No metadata, 0.333" in said
    assert said.endswith("trained again they would change too.")
    assert "], better than the reference." in said
    folder = write_suite(tmp_path, {**THREE, "measures": ["brier"]}, answers)
    said = sentences(aggregate(folder, 100), folder)
    assert "No interval is drawn of Brier score, multi-class, so no difference is tested." in said
    assert said.endswith("The lowest Brier score, multi-class is that of DualRefNet, 0.177.")


def test_a_suite_of_two_compares_one_and_one_without_a_reference_none(tmp_path: Path) -> None:
    two = {**THREE, "grid": [{**THREE["grid"][0], "methods": ["dualrefnet", "no_metadata"]}]}
    folder = write_suite(tmp_path / "two", two, answers)
    assert "No metadata is worse than the reference in accuracy, by 0.583." in sentences(aggregate(folder, 200), folder)
    folder = write_suite(tmp_path / "none", {**THREE, "reference": None}, answers)
    said = sentences(aggregate(folder, 200), folder)
    assert "The suite names no reference, so no difference is tested." in said
    assert "The highest accuracy is that of DualRefNet, 0.917" in said
    assert "whether it is better than another isn't tested" in said


def test_a_system_that_knows_the_diagnosis_never_wins(tmp_path: Path) -> None:
    variants = [
        {"name": "honest"},
        {"name": "leaky", "set": {"metadata.imputation": "label_leaking", "modality_dropout": {}}},
    ]
    suite = changed(
        rows="variant",
        reference="honest",
        grid_methods=["dualrefnet"],
        grid_variants=variants,
        grid_folds=[0],
        grid_seeds=[0],
    )
    folder = write_suite(tmp_path, suite, lambda cell: wrong_on(*(() if cell.variant == "leaky" else range(16))))
    found = aggregate(folder, 200)
    assert row(found.comparisons, measure="accuracy")["p_holm"] < 0.05
    said = sentences(found, folder)
    assert "Left out here, because the diagnosis is in its metadata: leaky (LABEL-LEAKING IMPUTATION)." in said
    assert "better" not in said
    assert f"{MEANINGS[LABEL_LEAKING]} (leaky (LABEL-LEAKING IMPUTATION))." in suite_notes(found)
    assert list(choose_pairs(found, folder)) == []


def test_notes_are_told_once_with_the_systems_that_they_are_about(tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "metadata_only"], grid_folds=[0], grid_seeds=[0, 1])
    suite["grid"][0]["set"] |= {"training.encoder": "frozen", "metadata.tier": "M3"}
    folder = write_suite(tmp_path / "drawn", suite, lambda cell: wrong_on(0), drawn=True, weights="none")
    shutil.rmtree(folder / "runs" / "sample-dualrefnet-efficientnet_lite0-fold0-seed1")
    failed = folder / "runs" / "sample-metadata_only-efficientnet_lite0-fold0-seed1"
    shutil.rmtree(failed)
    write_json(
        folder / "failures" / f"{failed.name}.json", {"error": "out of memory", "kind": "RuntimeError", "log": ""}
    )
    notes = suite_notes(aggregate(folder, 100))
    assert notes[0].startswith(
        "Incomplete: 2 of 4 runs are finished (1 not started, 1 failed). Runs are missing of: all systems."
    )
    assert {note.split(":")[0] for note in notes[1:]} == {
        "The image encoder started from random numbers, not from ImageNet (DualRefNet).",
        "Drawn pictures of invented lesions, made by a program",
        "The image encoder was frozen and has learned nothing about skin",
        "In this data set forms have gaps where a lesion was not biopsied, and those lesions are benign",
    }
    assert len(notes) == 5
    told = {note.split(":")[0]: note for note in notes}
    assert told["Drawn pictures of invented lesions, made by a program"].endswith(
        "nothing about medicine (all systems)."
    )
    assert told["The image encoder was frozen and has learned nothing about skin"].endswith("(DualRefNet).")
    leaking = suite_notes(paper_suite(tmp_path / "paper"))
    assert [note for note in leaking if "The split leaks" in note] == [
        "The split leaks: test photographs show patients or lesions that training has seen, so the numbers are too good for new "
        "patients (all systems)."
    ]


def test_the_page_holds_every_table_and_picture_and_fetches_nothing(three: Path, page: Path) -> None:
    text, said = page.read_text(encoding="utf-8"), words(page)
    tables = printed_tables(aggregate(three, 200))
    assert any(table.title.startswith("By class") for table in tables)
    for table in tables:
        assert " ".join(table.title.split()) in said
        for cell in (cell for line in table.rows for cell in line):
            assert cell.text in said
            assert cell.small in said
    names = sorted(path.stem for path in (page.parent / "pictures").glob("*.svg"))
    assert names == ["systems_accuracy", "systems_balanced_accuracy"]
    assert text.count("<svg") == len(names) == len(list((page.parent / "pictures").glob("*.csv")))
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?http|@import|<script|<link""", text)
    folded = re.findall(r'<details id="(\w+)"', text)
    assert folded == ["classes", "made"]
    assert text.index('id="tables"') < text.index("By class:")
    assert "How each row was made" in text[text.index('<details id="made"') :]
    assert "treat it as patient data" not in said
    assert said.count("grouped-cv") > 1
    assert "reference: dualrefnet" in said, "the suite itself stands in the page"


def test_measures_that_are_equal_by_definition_or_too_many_are_not_drawn(tmp_path: Path) -> None:
    measures = ["accuracy", "recall_weighted", "balanced_accuracy", "f1_macro", "kappa"]
    folder = write_suite(tmp_path / "suite", {**THREE, "measures": measures}, answers)
    page = write_suite_report(folder, photographs=False, samples=100)
    assert page == folder / "report" / "report.html"
    drawn = sorted(path.stem for path in (folder / "report" / "pictures").glob("*.png"))
    assert drawn == ["systems_accuracy", "systems_balanced_accuracy", "systems_f1_macro"]
    assert "Not drawn: Cohen's kappa (in the tables); recall, weighted equals accuracy by definition." in words(page)


def test_variants_also_show_their_distance_from_the_reference(tmp_path: Path) -> None:
    variants = [{"name": "whole"}, {"name": "no R", "set": {"loss.penalty": 0}}]
    suite = changed(
        rows="variant",
        reference="whole",
        grid_methods=["dualrefnet"],
        grid_variants=variants,
        grid_folds=[0],
        grid_seeds=[0],
    )
    folder = write_suite(tmp_path, suite, lambda cell: wrong_on(*((0, 3) if cell.variant else ())))
    page = write_suite_report(folder, photographs=False, samples=100)
    assert "ablation_accuracy" in {path.stem for path in (page.parent / "pictures").glob("*.svg")}
    assert "Distance from the reference: accuracy" in words(page)


def test_two_systems_are_counted_image_by_image(three: Path, page: Path) -> None:
    (pair,) = choose_pairs(aggregate(three, 100), three)
    assert [run.path.name for run in pair.runs] == [
        f"sample-{method}-efficientnet_lite0-fold0-seed0" for method in ("dualrefnet", "no_metadata")
    ]
    said = words(page)
    assert "DualRefNet is the reference; No metadata is the baseline without metadata." in said
    assert "one training is looked at: fold 0, seed 0." in said
    # Both err on image 5; only DualRefNet on 0; only the baseline on the other fifteen.
    assert (
        "Of the 24 test photographs both are right on 7, DualRefNet alone on 15, No metadata alone on 1, and none on 1."
        in said
    )
    assert "Balanced accuracy on them: 0.917 of DualRefNet, 0.333 of No metadata, difference +0.583 [" in said
    # Images 0, 3, 6 ... are of class ACK.
    assert "ACK 8 2 5 1 0" in said


def test_without_a_baseline_the_most_distant_system_is_taken(tmp_path: Path) -> None:
    wrong = {"dualrefnet": (0,), "concat": (0, 1), "metablock": (0, 1, 2, 3)}
    suite = changed(grid_methods=list(wrong), grid_folds=[0], grid_seeds=[0, 1])
    folder = write_suite(tmp_path, suite, lambda cell: wrong_on(*wrong[cell.method]))
    shutil.rmtree(folder / "runs" / "sample-metablock-efficientnet_lite0-fold0-seed0")
    (pair,) = choose_pairs(aggregate(folder, 100), folder)
    assert pair.names == ("DualRefNet", "MetaBlock")
    assert (
        "MetaBlock is the system farthest from it in accuracy. Of each, one training is looked at: fold 0, seed 1."
        in pair.rule
    )


def test_the_reference_is_the_best_of_several_and_its_baseline_is_like_it(tmp_path: Path) -> None:
    variants = [{"name": tier, "set": {"metadata.tier": tier}} for tier in ("M1", "M3")]
    suite = changed(grid_methods=["dualrefnet", "no_metadata"], grid_variants=variants, grid_folds=[0], grid_seeds=[0])
    folder = write_suite(
        tmp_path,
        suite,
        lambda cell: wrong_on(*((0, 1) if cell.method == "no_metadata" or cell.variant == "M1" else ())),
    )
    found = aggregate(folder, 100)
    (pair,) = choose_pairs(found, folder)
    assert pair.names == ("DualRefNet M3", "No metadata M3")
    assert "DualRefNet M3 is the reference (of 2 the one with the best accuracy)" in pair.rule
    assert "Each other system is compared with the one of them that is most like it." in sentences(found, folder)


@pytest.fixture(scope="module")
def photographed(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite whose test images are those of the drawn data set."""
    suite = changed(grid_methods=list(WRONG), grid_folds=[0], grid_seeds=[0])
    suite["grid"][0]["set"] |= {"data.root": str(sample_root), "image.size": 32}
    ids = [name for name in load_dataset("sample", sample_root).table["image_id"] if name[-2:].isdigit()][:24]
    return write_suite(tmp_path_factory.mktemp("photographed") / "suite", suite, answers, ids=ids)


def test_photographs_are_shown_with_both_answers(photographed: Path, tmp_path: Path) -> None:
    page = write_suite_report(photographed, tmp_path / "out", cache=tmp_path / "cache", samples=100)
    said, pictures = words(page), page.parent / "pictures"
    assert page.read_text(encoding="utf-8").count("<image") == 7
    assert "Right with DualRefNet, wrong with No metadata" in said
    assert "Right with No metadata, wrong with DualRefNet" in said
    assert "treat it as patient data" in said, "the runs don't say that their data are drawn"
    cases = pd.read_csv(pictures / "cases_first_right.csv")
    assert cases["image_id"].nunique() == 6
    ours, theirs = (cases[cases["system"] == name] for name in ("DualRefNet", "No metadata"))
    assert (ours["predicted"] == ours["label"]).all()
    assert (theirs["predicted"] != theirs["label"]).all()
    assert ours[["probability", "probability_of_true_class"]].to_numpy() == pytest.approx(np.full((6, 2), 0.8))
    assert theirs[["probability", "probability_of_true_class"]].to_numpy() == pytest.approx(np.tile([0.8, 0.1], (6, 1)))
    assert len(pd.read_csv(pictures / "cases_second_right.csv")) == 2
    # A later call without photographs leaves none behind.
    again = write_suite_report(photographed, tmp_path / "out", photographs=False, samples=100)
    assert not list(pictures.glob("cases*"))
    assert "<image" not in again.read_text(encoding="utf-8")
    assert "DualRefNet alone on 15" in words(again)
    assert "left out: they could not be read" not in words(again)


def test_data_that_are_not_there_are_said_and_the_counts_stay(
    photographed: Path, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_suite_report(photographed, tmp_path / "no_data", root=tmp_path / "nowhere", samples=100)
    assert "The photographs themselves are left out: they could not be read where this page was written." in words(page)
    assert "DualRefNet alone on 15" in words(page)
    assert "treat it as patient data" not in words(page)
    assert "no photographs of sample in the report: there is no folder" in " ".join(capsys.readouterr().err.split())
    moved = shutil.copytree(sample_root, tmp_path / "moved")
    (pair,) = choose_pairs(aggregate(photographed, 100), photographed)
    (moved / "images" / f"{find_disagreement(*pair.runs, CASES, 10).chosen['image_id'][0]}.png").unlink()
    page = write_suite_report(photographed, tmp_path / "one_lost", root=moved, cache=tmp_path / "cache", samples=100)
    assert "<image" not in page.read_text(encoding="utf-8")
    assert "1 of 7 photographs can't be read in" in " ".join(capsys.readouterr().err.split())


def test_several_data_sets_have_a_section_each_and_no_common_root(tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "no_metadata"], grid_folds=[0], grid_seeds=[0])
    block = {"recipe": "pad_ufes_20", "methods": ["dualrefnet", "no_metadata"]}
    folder = write_suite(tmp_path / "suite", {**suite, "grid": [*suite["grid"], block]}, answers)
    page = write_suite_report(folder, photographs=False, root=tmp_path, samples=100)
    said = words(page)
    assert "Where two systems differ: sample, protocol grouped-cv" in said
    assert "Where two systems differ: pad_ufes_20, protocol grouped" in said
    assert "pad_ufes_20, patients apart: tested on 24 images of 12 patients." in said
    assert "Of each, one training is looked at: seed 0." in said
    with pytest.raises(
        RecipeError, match="--root is the folder of one data set, and the suite has pad_ufes_20 and sample"
    ):
        write_suite_report(folder, root=tmp_path, samples=100)


def test_a_suite_of_splits_alone_has_its_page(tmp_path: Path) -> None:
    suite: dict[str, Any] = {
        "name": "t",
        "title": "Counted",
        "splits": [{"dataset": "pad_ufes_20", "protocol": "paper"}],
    }
    write_yaml(tmp_path / "suite.yaml", suite)
    with pytest.raises(RunError, match=r"nothing of the suite in .* is finished"):
        write_suite_report(tmp_path)
    rows = pd.DataFrame({"image_id": ["a", "b", "c"], "patient_id": ["p", "q", "r"], "label": ["BCC", "MEL", "MEL"]})
    write_csv(tmp_path / "splits" / "pad_ufes_20-paper.csv", rows.assign(split=["train", "val", "test"]))
    said = words(write_suite_report(tmp_path))
    assert (
        "Photographs of pad_ufes_20, the paper's split: 1 train, 1 val, 1 test. 0 of 18 counts are those of the paper's Table 1."
        in said
    )
    assert "The split leaks" in said
    assert "Images, in brackets the paper's: pad_ufes_20, protocol paper" in said
    assert "Where two systems differ" not in said


def test_a_suite_without_a_finished_run_says_what_to_do(three: Path, tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    shutil.copy(three / "suite.yaml", folder)
    with pytest.raises(
        RunError, match=r"there is nothing to show yet\. `dualrefnet suite .*suite.yaml --out .*` goes on"
    ):
        write_suite_report(folder)
    cell = expand(load_suite(folder / "suite.yaml"))[0]
    write_json(folder / "failures" / f"{cell.run}.json", {"error": "boom", "kind": "RuntimeError", "log": ""})
    with pytest.raises(RunError, match=r"is finished \(1 failed: .*failures says why\): there is nothing"):
        write_suite_report(folder)
    assert not (folder / "report").exists()
    with pytest.raises(RunError, match=r"has no suite\.yaml"):
        write_suite_report(tmp_path)


def test_systems_without_any_run_are_named_and_the_rest_is_shown(three: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(three, tmp_path / "suite")
    for run in (folder / "runs").glob("sample-dualrefnet-*"):
        shutil.rmtree(run)
    said = words(write_suite_report(folder, photographs=False, samples=100))
    assert "No run at all is there of: DualRefNet." in said
    assert "Not compared: the reference has no pooled value (Concat and No metadata)." in said
    assert "whether it is better than another isn't tested" in said
    assert (
        "Concat is the system with the best accuracy (the reference has no result); No metadata is the baseline" in said
    )


@pytest.mark.parametrize("first_right", [True, False])
def test_cases_are_drawn_inside_the_picture_whatever_they_are_called(first_right: bool) -> None:
    labels = ["seborrheic_keratosis", "actinic_keratosis_or_Bowen", "nevus", "melanoma"]
    right, wrong = ("a", "b") if first_right else ("b", "a")
    cases = pd.DataFrame(
        [
            {
                "image_id": str(place),
                "label": label,
                f"predicted_{right}": label,
                f"p_predicted_{right}": 0.9,
                f"p_true_{right}": 0.9,
                f"predicted_{wrong}": labels[place - 1],
                f"p_predicted_{wrong}": 0.61,
                f"p_true_{wrong}": 0.03,
            }
            for place, label in enumerate(labels)
        ]
    )
    names = ("attention on metadata (pad_ufes_20, protocol paper)", "image only")
    photographs = {str(place): np.zeros((8, 8, 3), np.uint8) for place in range(4)}
    picture = draw_cases(cases, photographs, names, first_right, "cases")
    winner, loser = names if first_right else names[::-1]
    assert picture.title == f"Right with {winner}, wrong with {loser}"
    assert f"true nevus: {names[0]} says" in picture.alt
    assert f"{loser} says actinic_keratosis_or_Bowen 61%, nevus 3%" in picture.alt
    assert picture.data.shape == (8, 6)
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    edge = picture.figure.bbox
    boxes = [axis._left_title.get_window_extent(canvas.get_renderer()) for axis in picture.figure.axes]  # type: ignore[attr-defined]
    assert all(edge.y0 <= box.y0 and box.y1 <= edge.y1 and edge.x0 <= box.x0 and box.x1 <= edge.x1 for box in boxes)
    # Words of one photograph stay clear of the next one's, and of the row above.
    assert all(left.x1 < right_box.x0 for left, right_box in ((boxes[0], boxes[1]), (boxes[1], boxes[2])))
    assert boxes[3].y1 < picture.figure.axes[0].get_window_extent().y0
