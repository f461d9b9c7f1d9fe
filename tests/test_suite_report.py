import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from dualrefnet.data.adapters import load_dataset
from dualrefnet.errors import RecipeError, RunError
from dualrefnet.files import write_json
from dualrefnet.report.suite_report import NOTES, choose_pairs, suite_notes, write_suite_report
from dualrefnet.suite.grid import Cell, expand, load_suite
from dualrefnet.suite.results import FROZEN, LEAKING_SPLIT, SYNTHETIC, SuiteResults, aggregate
from dualrefnet.suite.tables import printed_tables
from read_page import Page, Reader
from suite_folder import changed, paper_suite, write_suite, wrong_on

# DualRefNet errs on 2 of 24 images, Concat on 2 others, the image-only baseline on 16.
WRONG = {"dualrefnet": (0, 5), "concat": (2, 3), "no_metadata": tuple(range(4, 20))}
THREE = changed(grid_methods=list(WRONG), grid_folds=[0], grid_seeds=[0, 1], per_class=True)


def predict(cell: Cell) -> NDArray[np.int64]:
    return wrong_on(*WRONG[cell.key.method])


def text_of(page: Path) -> str:
    return Reader(page.read_text(encoding="utf-8")).root.words()


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
    found = Page(page)
    tables = printed_tables(three_results)
    assert {kind for kind, _ in tables} == {"results", "classes", "details"}
    for _, table in tables:
        assert len(found.table(" ".join(table.title.split()))) == 1 + len({line[0].text for line in table.rows})
    names = sorted(path.stem for path in (page.parent / "pictures").glob("*.svg"))
    assert names == ["systems_accuracy", "systems_balanced_accuracy"]
    assert len(found.svgs) == len(found.numbers()) == 2
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?http|@import|<script|<link""", found.text)
    folded = [key for key, element in found.sections.items() if element.tag == "details"]
    assert folded == ["classes", "provenance"]
    assert "reference: dualrefnet" in found.text, "the suite itself is in the page"
    assert "treat it as patient data" not in found.root.words()


def test_two_systems_are_compared_image_by_image(three_results: SuiteResults, page: Path) -> None:
    (pair,) = choose_pairs(three_results)
    assert [run.path.name for run in pair.runs] == [
        f"sample-{method}-efficientnet_lite0-fold0-seed0" for method in ("dualrefnet", "no_metadata")
    ]
    found = Page(page)
    # Both err on image 5; only DualRefNet on 0; only the baseline on the other fifteen. Images 0, 3 ... are ACK.
    table = found.table("Correct predictions: DualRefNet and No metadata")
    assert (table["all"], table["ACK"]) == (["24", "7", "15", "1", "1"], ["8", "2", "5", "1", "0"])
    assert "0.917 for DualRefNet, 0.333 for No metadata, difference +0.583 [" in " ".join(found.intro("disagreement"))


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
    # On CNNs and transformers it is the best of each, not those that are farthest apart.
    wrong = {"vgg13": (0, 1), "resnet50": (0,), "swin_b": tuple(range(9)), "vit_b_16": (2, 3)}
    values = {"grid_methods": ["dualrefnet"], "grid_backbones": list(wrong), "reference": "vgg13"}
    values |= {"grid_folds": [0], "grid_seeds": [0]}
    assert choose(tmp_path / "c", lambda cell: wrong[cell.key.backbone], **values)[:2] == ("ResNet-50", "ViT-B/16")


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
    found = Page(write_suite_report(folder, photographs=False, root=tmp_path, samples=100))
    assert {"disagreement-1", "disagreement-2"} <= found.sections.keys()
    with pytest.raises(RecipeError, match="--root is the folder of one data set, and the suite has pad_ufes_20 and"):
        write_suite_report(folder, root=tmp_path, samples=100)


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
