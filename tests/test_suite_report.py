import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from numpy.typing import NDArray

from dualrefnet.data.adapters import load_dataset
from dualrefnet.errors import RecipeError, RunError
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.report.suite_report import NOTES, choose_pairs, draw_cases, suite_notes, write_suite_report
from dualrefnet.suite.grid import Cell, expand, load_suite
from dualrefnet.suite.results import FROZEN, LEAKING_SPLIT, SYNTHETIC, SuiteResults, aggregate
from dualrefnet.suite.tables import printed_tables
from read_page import read
from suite_folder import changed, paper_suite, write_suite, wrong_on

# DualRefNet errs on 2 of 24 images, Concat on 2 others, the image-only baseline on 16.
WRONG = {"dualrefnet": (0, 5), "concat": (2, 3), "no_metadata": tuple(range(4, 20))}
THREE = changed(grid_methods=list(WRONG), grid_folds=[0], grid_seeds=[0, 1], per_class=True)


def predict(cell: Cell) -> NDArray[np.int64]:
    return wrong_on(*WRONG[cell.key.method])


def text_of(page: Path) -> str:
    return read(page).root.words()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite of three systems; don't change it."""
    return write_suite(tmp_path_factory.mktemp("suite") / "three", THREE, predict)


@pytest.fixture(scope="module")
def three_results(three: Path) -> SuiteResults:
    return aggregate(three, 200)


@pytest.fixture(scope="module")
def page(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `three`, without images."""
    return write_suite_report(three, tmp_path_factory.mktemp("out"), photographs=False, samples=200)


def test_the_summary_is_that_of_the_numbers(three_results: SuiteResults, page: Path) -> None:
    summary = " ".join(read(page).lead("summary"))
    first = three_results.systems.iloc[0]
    assert f"Reference in accuracy: DualRefNet with 0.917 [{first['low']:.3f}, {first['high']:.3f}]." in summary
    assert "3 systems; 6 of 6 runs are finished." in summary
    assert "tested on 24 images of 12 patients." in summary
    assert "1 worse (No metadata); none better; 1 not significantly different (Concat)" in summary
    assert "Highest accuracy: DualRefNet, 0.917" in summary


@pytest.mark.parametrize(
    ("measure", "wrong", "expected"),
    [
        # Where no difference is shown none is claimed.
        ("accuracy", {"dualrefnet": (0,), "concat": (1,), "no_metadata": (2,)}, "none worse; none better; 2 not"),
        ("brier", WRONG, "Lowest Brier score, multi-class: DualRefNet"),
    ],
)
def test_equal_systems_and_measures_of_which_less_is_better(
    measure: str, wrong: dict[str, tuple[int, ...]], expected: str, tmp_path: Path
) -> None:
    suite = {**THREE, "measures": [measure]}
    folder = write_suite(tmp_path / "suite", suite, lambda cell: wrong_on(*wrong[cell.key.method]))
    assert expected in " ".join(read(write_suite_report(folder, photographs=False, samples=100)).lead("summary"))


def test_notes_name_what_limits_the_numbers(three: Path, tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "metadata_only"], grid_folds=[0], grid_seeds=[0, 1])
    suite["grid"][0]["set"]["training.encoder"] = "frozen"
    folder = write_suite(tmp_path / "suite", suite, lambda cell: wrong_on(0), drawn=True)
    lost, failed = (f"sample-{name}-efficientnet_lite0-fold0-seed1" for name in ("dualrefnet", "metadata_only"))
    shutil.rmtree(folder / "runs" / lost)
    shutil.rmtree(folder / "runs" / failed)
    write_json(folder / "failures" / f"{failed}.json", {"error": "boom", "kind": "RuntimeError", "log": ""})
    incomplete, *notes = suite_notes(aggregate(folder, 100))
    assert incomplete.startswith("Incomplete: 2 of 4 runs are finished (1 not started, 1 failed)")
    assert f"{NOTES[SYNTHETIC]} (all systems)." in notes
    assert f"{NOTES[FROZEN]} (DualRefNet)." in notes
    assert any("missing where a lesion was not biopsied" in note for note in notes)
    leaking = suite_notes(paper_suite(tmp_path / "paper", ["dualrefnet", "visual"], ["accuracy"]))
    assert f"{NOTES[LEAKING_SPLIT]} (all systems)." in leaking


def test_the_page_holds_every_table_and_figure_and_fetches_nothing(three_results: SuiteResults, page: Path) -> None:
    found = read(page)
    tables = printed_tables(three_results)
    assert {kind for kind, _ in tables} == {"results", "classes", "details"}
    for _, table in tables:
        assert len(found.table(" ".join(table.title.split()))) == 1 + len({line[0].text for line in table.rows})
    names = sorted(path.stem for path in (page.parent / "pictures").glob("*.svg"))
    assert names == ["systems_accuracy", "systems_balanced_accuracy"]
    assert len(found.svgs()) == len(found.numbers()) == 2
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?http|@import|<script|<link""", found.text)
    folded = [key for key, element in found.sections.items() if element.tag == "details"]
    assert folded == ["classes", "provenance"]
    assert "reference: dualrefnet" in found.text, "the suite itself is in the page"
    assert "treat it as patient data" not in found.root.words()


def test_equal_or_too_many_measures_are_not_drawn_and_variants_show_the_difference(tmp_path: Path) -> None:
    variants = [{"name": "full"}, {"name": "no R", "set": {"loss.penalty": 0}}]
    measures = ["accuracy", "recall_weighted", "balanced_accuracy", "f1_macro", "kappa"]
    values = {"rows": "variant", "reference": "full", "measures": measures, "grid_variants": variants}
    suite = changed(grid_methods=["dualrefnet"], grid_folds=[0], grid_seeds=[0], **values)
    folder = write_suite(tmp_path, suite, lambda cell: wrong_on(*((0, 3) if cell.key.variant == "no R" else ())))
    page = write_suite_report(folder, photographs=False, samples=100)
    assert page == folder / "report" / "report.html"
    drawn = {path.stem for path in (page.parent / "pictures").glob("*.png")}
    shown = ("accuracy", "balanced_accuracy", "f1_macro")
    assert drawn == {f"{kind}_{measure}" for kind in ("systems", "ablation") for measure in shown}


def test_two_systems_are_compared_image_by_image(three_results: SuiteResults, page: Path) -> None:
    (pair,) = choose_pairs(three_results)
    assert [run.path.name for run in pair.runs] == [
        f"sample-{method}-efficientnet_lite0-fold0-seed0" for method in ("dualrefnet", "no_metadata")
    ]
    found = read(page)
    # Both err on image 5; only DualRefNet on 0; only the baseline on the other fifteen. Images 0, 3 ... are ACK.
    table = found.table("Correct predictions: DualRefNet and No metadata")
    assert (table["all"], table["ACK"]) == (["24", "7", "15", "1", "1"], ["8", "2", "5", "1", "0"])
    assert "0.917 for DualRefNet, 0.333 for No metadata, difference +0.583 [" in " ".join(found.lead("disagreement"))


def choose(folder: Path, wrong: Callable[[Cell], tuple[int, ...]], **values: object) -> tuple[str, ...]:
    (pair,) = choose_pairs(aggregate(write_suite(folder, changed(**values), lambda cell: wrong_on(*wrong(cell))), 100))
    return (*pair.names, pair.runs[0].path.name[-5:])


def test_the_pair_is_the_best_reference_and_its_baseline_or_the_most_distant_system(tmp_path: Path) -> None:
    variants = [{"name": tier, "set": {"metadata.tier": tier}} for tier in ("M1", "M3")]
    poor = {("no_metadata", "M1"), ("no_metadata", "M3"), ("dualrefnet", "M1")}
    methods = ["dualrefnet", "no_metadata"]
    values = {"grid_variants": variants, "grid_folds": [0], "grid_seeds": [0]}
    chosen = choose(
        tmp_path / "a",
        lambda cell: (0, 1) if (cell.key.method, cell.key.variant) in poor else (),
        grid_methods=methods,
        **values,
    )
    assert chosen == ("DualRefNet M3", "No metadata M3", "seed0")
    wrong = {"dualrefnet": (0,), "concat": (0, 1), "metablock": (0, 1, 2, 3)}
    values = {"grid_methods": list(wrong), "grid_folds": [0], "grid_seeds": [0, 1]}
    assert choose(tmp_path / "b", lambda cell: wrong[cell.key.method], **values)[:2] == ("DualRefNet", "MetaBlock")


@pytest.fixture(scope="module")
def with_images(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite whose test images are those of the synthetic data set."""
    suite = changed(grid_methods=list(WRONG), grid_folds=[0], grid_seeds=[0])
    suite["grid"][0]["set"] |= {"data.root": str(sample_root), "image.size": 32}
    ids = [name for name in load_dataset("sample", sample_root).table["image_id"] if name[-2:].isdigit()][:24]
    return write_suite(tmp_path_factory.mktemp("images") / "suite", suite, predict, ids=ids)


def test_images_are_shown_with_both_predictions(with_images: Path, tmp_path: Path) -> None:
    page = write_suite_report(with_images, tmp_path / "out", cache=tmp_path / "cache", samples=100)
    folder = page.parent / "pictures"
    assert page.read_text(encoding="utf-8").count("<image") == 7
    assert "treat it as patient data" in text_of(page), "the runs don't say that their data are synthetic"
    cases = pd.read_csv(folder / "cases_first_right.csv")
    assert cases["image_id"].nunique() == 6
    ours, theirs = (cases[cases["system"] == name] for name in ("DualRefNet", "No metadata"))
    assert (ours["predicted"] == ours["label"]).all()
    assert (theirs["predicted"] != theirs["label"]).all()
    columns = ["probability", "probability_of_true_class"]
    assert ours[columns].to_numpy() == pytest.approx(np.full((6, 2), 0.8))
    assert theirs[columns].to_numpy() == pytest.approx(np.tile([0.8, 0.1], (6, 1)))
    assert len(pd.read_csv(folder / "cases_second_right.csv")) == 2
    # A later call without images leaves none behind.
    again = write_suite_report(with_images, tmp_path / "out", photographs=False, samples=100)
    assert not list(folder.glob("cases*"))
    assert "<image" not in again.read_text(encoding="utf-8")


def test_images_that_cannot_be_read_are_left_out(
    with_images: Path, sample_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_suite_report(with_images, tmp_path / "no_data", root=tmp_path / "nowhere", samples=100)
    assert "treat it as patient data" not in text_of(page)
    assert "no images of sample in the report: there is no folder" in " ".join(capsys.readouterr().err.split())
    moved = shutil.copytree(sample_root, tmp_path / "moved")
    shown = pd.read_csv(write_suite_report(with_images, tmp_path / "a").parent / "pictures" / "cases_first_right.csv")
    (moved / "images" / f"{shown['image_id'][0]}.png").unlink()
    capsys.readouterr()
    page = write_suite_report(with_images, tmp_path / "b", root=moved, cache=tmp_path / "cache", samples=100)
    assert "<image" not in page.read_text(encoding="utf-8")
    assert "1 of 7 images can't be read in" in " ".join(capsys.readouterr().err.split())


def test_several_data_sets_have_a_section_each_and_no_common_root(tmp_path: Path) -> None:
    suite = changed(grid_methods=["dualrefnet", "no_metadata"], grid_folds=[0], grid_seeds=[0])
    suite["grid"].append({"recipe": "pad_ufes_20", "methods": ["dualrefnet", "no_metadata"]})
    folder = write_suite(tmp_path / "suite", suite, predict)
    found = read(write_suite_report(folder, photographs=False, root=tmp_path, samples=100))
    assert {"disagreement-1", "disagreement-2"} <= found.sections.keys()
    with pytest.raises(RecipeError, match="--root is the folder of one data set, and the suite has pad_ufes_20 and"):
        write_suite_report(folder, root=tmp_path, samples=100)


def test_a_suite_of_splits_alone_has_its_page(tmp_path: Path) -> None:
    splits = [{"dataset": "pad_ufes_20", "protocol": "paper"}]
    write_yaml(tmp_path / "suite.yaml", {"name": "t", "title": "Counted", "splits": splits})
    with pytest.raises(RunError, match=r"nothing of the suite in .* is finished"):
        write_suite_report(tmp_path)
    rows = pd.DataFrame({"image_id": ["a", "b", "c"], "patient_id": ["p", "q", "r"], "label": ["BCC", "MEL", "MEL"]})
    write_csv(tmp_path / "splits" / "pad_ufes_20-paper.csv", rows.assign(split=["train", "val", "test"]))
    text = text_of(write_suite_report(tmp_path))
    assert "1 train, 1 val, 1 test. 0 of 18 counts are those of the paper's Table 1." in text
    assert NOTES[LEAKING_SPLIT] in text


def test_a_suite_without_a_finished_run_is_refused_and_systems_without_any_are_named(
    three: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(three, tmp_path / "suite")
    for run in (folder / "runs").glob("sample-dualrefnet-*"):
        shutil.rmtree(run)
    text = text_of(write_suite_report(folder, photographs=False, samples=100))
    assert "Runs are missing of: DualRefNet." in text
    assert "Not compared: the reference has no pooled value (Concat, No metadata)." in text
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "report")
    cell = expand(load_suite(folder / "suite.yaml"))[0]
    write_json(folder / "failures" / f"{cell.run}.json", {"error": "boom", "kind": "RuntimeError", "log": ""})
    with pytest.raises(RunError, match=r"is finished \(1 failed: .*failures says why\).*suite.yaml --out .*` goes on"):
        write_suite_report(folder)
    assert not (folder / "report").exists()


@pytest.mark.parametrize("first_right", [True, False])
def test_cases_fit_into_their_figure_whatever_they_are_called(first_right: bool) -> None:
    labels = ["seborrheic_keratosis", "actinic_keratosis_or_Bowen", "nevus", "melanoma"]
    right, wrong = ("a", "b") if first_right else ("b", "a")
    cases = pd.DataFrame({"image_id": list("0123"), "label": labels})
    cases = cases.assign(**{f"predicted_{right}": labels, f"p_predicted_{right}": 0.9, f"p_true_{right}": 0.9})
    others = [labels[place - 1] for place in range(4)]
    cases = cases.assign(**{f"predicted_{wrong}": others, f"p_predicted_{wrong}": 0.61, f"p_true_{wrong}": 0.03})
    names = ("attention on metadata (pad_ufes_20, protocol paper)", "image only")
    images = {str(place): np.zeros((8, 8, 3), np.uint8) for place in range(4)}
    drawn = draw_cases(cases, images, names, "cases")
    winner, loser = names if first_right else names[::-1]
    assert drawn.title == f"{winner} right, {loser} wrong"
    assert f"{loser} predicts actinic_keratosis_or_Bowen 61%, nevus 3%" in drawn.alt
    assert drawn.data.shape == (8, 6)
    canvas = FigureCanvasAgg(drawn.figure)
    canvas.draw()
    edge, axes = drawn.figure.bbox, drawn.figure.axes
    boxes = [axis._left_title.get_window_extent(canvas.get_renderer()) for axis in axes]  # type: ignore[attr-defined]
    assert all(edge.y0 <= box.y0 and box.y1 <= edge.y1 and edge.x0 <= box.x0 and box.x1 <= edge.x1 for box in boxes)
    # The text of one image stays clear of the next one's, and of the row above.
    assert all(left.x1 < right_box.x0 for left, right_box in ((boxes[0], boxes[1]), (boxes[1], boxes[2])))
    assert boxes[3].y1 < axes[0].get_window_extent().y0
