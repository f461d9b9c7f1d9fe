import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import balanced_accuracy_score

import dualrefnet
from conftest import TINY
from dualrefnet.analysis import gradcam
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.display.format import MEASURE_NAMES, PrintedTable
from dualrefnet.errors import DataError, RunError, install_hint
from dualrefnet.files import read_json, write_json, write_yaml
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from read_page import Page

pytest.importorskip("captum")
pytest.importorskip("shap")

from dualrefnet.report import ReportOptions, explanations, run_report
from dualrefnet.report.explanations import comparison_section
from dualrefnet.report.performance import CLASS_MEASURES, HEADLINE, class_section, read_measured, summary_section
from dualrefnet.report.run_report import PERSONAL, write_explanations, write_report
from dualrefnet.report.verdict import QUESTIONS

SMALL = ReportOptions(images=40, shap_images=6, each=1)
CANCERS = ["BCC", "MEL", "SCC"]
MEASURED = ["summary", "classes", "curves", "calibration", "conformal", "training"]
EXAMINED = ["subgroups", "shortcuts", "missing-metadata", "out-of-distribution", "images", "audit"]


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_report, explanations):
            patch.setattr(module, "SAMPLES", 50)
        # Images of 32 px have maps of one place.
        patch.setattr(gradcam, "FEWEST_PLACES", 1)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


def trained(sample_root: Path, out: Path, **changes: Any) -> Run:
    """Train another method on the split of `tiny_run`."""
    from dualrefnet.training.train import train_recipe

    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return train_recipe(load_recipe("sample", {"data.root": str(sample_root), **TINY, **changed}), out)


@pytest.fixture(scope="module")
def image_run(sample_root: Path, folder: Path) -> Run:
    return trained(sample_root, folder / "image", model__method="no_metadata", training__epochs=1)


@pytest.fixture(scope="module")
def metadata_run(sample_root: Path, folder: Path) -> Run:
    """A run that has learned something, unlike the others: metadata are learned in a second."""
    training = {"training__epochs": 30, "training__learning_rate": 0.003}
    return trained(sample_root, folder / "metadata", model__method="metadata_only", **training)


@pytest.fixture(scope="module")
def full(tiny_run: Run, image_run: Run, folder: Path) -> Page:
    """The page with all sections."""
    return Page(write_report(tiny_run, folder / "full", against=image_run, options=SMALL))


@pytest.fixture(scope="module")
def shared(tiny_run: Run, metadata_run: Run, folder: Path) -> Page:
    """The page without images of patients."""
    options = ReportOptions(SMALL.images, SMALL.shap_images, SMALL.each, label="BCC", photographs=False)
    return Page(write_report(tiny_run, folder / "shared", against=metadata_run, options=options))


@pytest.fixture(scope="module")
def metadata_page(metadata_run: Run) -> Page:
    return Page(write_report(metadata_run, options=ReportOptions(images=20, shap_images=6, each=1, label="MEL")))


@pytest.fixture(params=["full", "shared", "metadata_page"])
def page(request: pytest.FixtureRequest) -> Page:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Page)
    return found


def rows_of(run: Run) -> pd.DataFrame:
    return run.predictions.query("split == 'test'")


def balanced_accuracy(run: Run) -> float:
    rows = rows_of(run)
    return float(balanced_accuracy_score(rows["label"], rows["predicted"]))


# The page as HTML.


def test_ids_are_unique_and_links_and_headings_are_complete(page: Page) -> None:
    found = Counter(one.attributes["id"] for one in page.root.all() if "id" in one.attributes)
    assert set(found.values()) == {1}
    links = re.findall(r"url\((#[^)]+)\)", page.text)
    for one in page.root.all():
        links += [value for name, value in one.attributes.items() if name in ("href", "xlink:href")]
        links += [f"#{value}" for name, value in one.attributes.items() if name == "aria-labelledby"]
    places = {link[1:] for link in links if link.startswith("#")}
    assert places & {f"{key}-body" for key in page.sections}
    assert places <= set(found)
    levels = [int(one.tag[1]) for one in page.root.all() if re.fullmatch("h[1-6]", one.tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert max(np.diff(levels)) <= 1, "a level is left out"
    assert all(section.tag == "details" and "open" not in section.attributes for section in page.sections.values())
    (verdict,) = [one for one in page.root.all("ul") if one.attributes.get("aria-label") == "Verdict"]
    lines = verdict.own("li")
    assert [line.own("b")[0].words().lower() for line in lines] == list(QUESTIONS)
    assert {line.attributes["class"] for line in lines} <= {"pass", "warn", "fail", ""}
    # A browser that follows a link opens what it points into.
    inside = {one.attributes.get("id") for section in page.sections.values() for one in section.own("div")}
    assert {link.attributes["href"][1:] for link in verdict.all("a")} <= inside


def test_figures_have_texts_and_cells_have_headers(page: Page) -> None:
    figures = list(page.root.all("svg"))
    assert len(figures) == len(page.stems)
    for svg in figures:
        title, _, alt = svg.attributes["aria-label"].partition(". ")
        assert alt.strip(" .")
        assert svg.parent is not None
        assert [heading.words() for heading in svg.parent.own("h3")] == [title]
        assert svg.parent.own("figcaption")[0].words()
        fills = {(re.findall(r"fill: ([^;]+)", text.attributes["style"]) or ["black"])[0] for text in svg.all("text")}
        on_cells = {"black", "#ffffff"} if title == "Confusion matrix" else set()
        assert fills - on_cells == {"var(--ink)"}, title
    for table in page.root.all("table"):
        head, *rows = table.all("tr")
        assert {cell.attributes["scope"] for cell in head.own()} == {"col"}
        for row in rows:
            assert [cell.attributes["scope"] for cell in row.own("th")] == ["row"]
            assert len(row.own()) == len(head.own())
            assert {cell.words() for cell in row.own("td")} - {"–", ""}, row.words()


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    refused = {"script", "link", "iframe", "object", "embed", "img", "base", "form", "foreignobject"}
    inline = ("#", "data:image/png;base64,", "data:image/jpeg;base64,", "data:text/csv;base64,")
    for one in page.root.all():
        assert one.tag not in refused
        for name, value in one.attributes.items():
            assert not name.startswith("on"), (one.tag, name)
            assert name not in ("src", "srcset", "action", "poster", "ping")
            assert name not in ("href", "xlink:href") or value.startswith(inline), value[:60]
    assert "@import" not in page.text
    assert set(re.findall(r"url\((.)", page.text)) == {"#"}
    # Names of the languages, which nobody requests.
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"' <]+", page.text)) == names
    policy = [one.attributes.get("content", "") for one in page.root.all("meta") if "http-equiv" in one.attributes]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_figures_lie_beside_the_page_and_their_numbers_in_it(page: Page) -> None:
    files = sorted(path.name for path in page.pictures.iterdir())
    assert files == sorted(f"{stem}.{suffix}" for stem in page.stems for suffix in ("png", "svg", "csv"))
    for stem in page.stems:
        assert (page.pictures / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (page.pictures / f"{stem}.svg").read_bytes()
    assert page.numbers() == {f"{stem}.csv": (page.pictures / f"{stem}.csv").read_bytes() for stem in page.stems}
    assert sorted(path.name for path in page.file.parent.iterdir()) == ["pictures", "report.html"]


def test_limitations_and_recipe_are_in_the_page(page: Page) -> None:
    (notes,) = [one for one in page.root.all("div") if one.attributes.get("role") == "note"]
    assert "Synthetic images" in notes.words()
    (footer,) = page.root.all("footer")
    assert "Not a medical device" in footer.words()
    assert "of patients" not in footer.words()
    (recipe,) = page.root.all("pre")
    made = Recipe.model_validate(yaml.safe_load("".join(str(part) for part in recipe.parts)))
    assert (made.data.dataset, made.image.size) == ("sample", 32)


# Its numbers.


def test_tables_and_sentences_hold_the_measures(full: Page, tiny_run: Run) -> None:
    rows, metrics = rows_of(tiny_run), tiny_run.metrics
    flat = {**metrics, **{f"malignant_{name}": value for name, value in metrics["malignant"].items()}}
    table = full.table("Test set")
    assert table.pop("head") == ["measure", "this run"]
    assert list(table) == [MEASURE_NAMES[name] for name in HEADLINE]
    for name in HEADLINE:
        bounds = flat.get(f"{name}_ci95")
        expected = f"{flat[name]:.3f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
        expected = expected.replace("-", "−")
        assert table[MEASURE_NAMES[name]] == [expected]
    table = full.table("Each class versus the rest, with 95% intervals")
    assert table.pop("head") == ["class", "sensitivity", "specificity", "PPV", "NPV", "AUC"]
    support = rows["label"].value_counts()
    for (first, cells), (label, values) in zip(table.items(), metrics["per_class"].items(), strict=True):
        assert first == f"{label} {tiny_run.model['dataset']['class_names'][label]}, {support[label]} images"
        expected = ["–" if values[name] is None else f"{values[name]:.3f}" for name in CLASS_MEASURES]
        assert [cell.split(" ")[0] for cell in cells] == expected
    (results,) = full.root.all("dl")
    assert f"{balanced_accuracy(tiny_run):.3f}[" in results.words().replace(" ", "")


def test_sections_of_a_run_that_has_everything(full: Page, tiny_run: Run) -> None:
    explained = ["gallery", "gradcam", "shap", "tsne", "super-resolution"]
    assert list(full.sections) == [*MEASURED, *explained, *EXAMINED, "comparison", "provenance"]
    rows = rows_of(tiny_run)
    # One correct and one incorrect case of each class, where there is one.
    kinds = rows.assign(right=rows["label"] == rows["predicted"])[["label", "right"]].drop_duplicates()
    shown = pd.concat([pd.read_csv(path) for path in full.pictures.glob("gallery_*.csv")])
    assert len(shown) == len(kinds)
    assert set(shown["image_id"]) <= set(rows["image_id"])
    assert len(list(full.sections["gallery"].all("image"))) == 2 * len(kinds)
    labels = {stem.rpartition("_")[2] for stem in full.stems if stem.startswith("shap_beeswarm")}
    assert labels == {"ACK", "BCC", "MEL", "NEV", "SCC", "SEK"}
    assert {"shap_importance_field", "shap_importance_column"} <= set(full.stems)
    assert pd.read_csv(full.pictures / "shap_beeswarm_field_MEL.csv")["image_id"].nunique() == SMALL.shap_images
    assert set(rows["image_id"]) == set(pd.read_csv(full.pictures / "embedding.csv")["image_id"])


def test_a_map_of_a_few_places_is_not_shown(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcam, "FEWEST_PLACES", 6)
    made = explanations.Explanations(open_run(tiny_run), SMALL)
    assert made.gradcam().figures == []
    assert "1 x 1 places" in made.gradcam().intro[1]
    for figure in made.gallery().figures:
        assert sum(bool(axis.images) for axis in figure.figure.axes) == len(figure.data)


def test_two_runs_are_compared(tiny_run: Run, metadata_run: Run) -> None:
    ours, theirs = balanced_accuracy(tiny_run), balanced_accuracy(metadata_run)
    assert theirs - ours > 0.15, "the metadata are informative"
    section = comparison_section(open_run(tiny_run), open_run(metadata_run), SMALL)
    values = [float(value) for value in re.findall(r"[-+]?\d+\.\d{3}", section.intro[0].replace("−", "-"))]
    assert values[:3] == pytest.approx((ours, theirs, ours - theirs), abs=6e-4)
    difference, low, high, p = values[2:]
    assert low < difference < high
    assert ("Metadata only is better" in section.intro[0]) == (high < 0)
    assert (p < 0.05) == (high < 0) or high == pytest.approx(0, abs=0.02)
    right = {"cases_first_right": tiny_run, "cases_second_right": metadata_run}
    assert [figure.name for figure in section.figures[:2]] == ["embeddings", "separation"]
    assert "cases_second_right" in {figure.name for figure in section.figures[2:]} <= set(right)
    for figure in section.figures[2:]:
        cases = figure.data
        for run, rows in ((tiny_run, cases[::2]), (metadata_run, cases[1::2])):
            known = rows_of(run).set_index("image_id").loc[rows["image_id"]]
            assert list(rows["predicted"]) == list(known["predicted"])
            probabilities = [known.loc[row["image_id"], f"prob_{row['label']}"] for _, row in rows.iterrows()]
            np.testing.assert_allclose(rows["probability_of_true_class"], probabilities)
            assert (rows["predicted"] == rows["label"]).eq(run is right[figure.name]).all()
        assert 1 <= len(cases) // 2 <= 3


# Without images of patients.


def test_without_photographs_no_image_is_shown_or_named(shared: Page, full: Page, tiny_run: Run) -> None:
    assert "gallery" not in shared.sections
    # The only pixels are the colour bars, which are long and narrow.
    for title, svg in shared.svgs.items():
        bars = list(svg.all("image"))
        assert len(bars) <= 1, title
        assert all(float(bar.attributes["width"]) > 10 * float(bar.attributes["height"]) for bar in bars)
    split = tiny_run.split
    names = set(split["image_id"]) | set(split["patient_id"])
    assert any(name in full.text for name in split["image_id"]), "ids are looked for in the wrong way"
    texts = {path.name: path.read_text() for path in shared.pictures.iterdir() if path.suffix in (".csv", ".svg")}
    texts |= {f"in the page: {name}": content.decode() for name, content in shared.numbers().items()}
    for where, text in {**texts, "page": shared.text}.items():
        assert not [name for name in names if name in text], where
        assert "PAT_" not in text, where
    for path in shared.pictures.glob("*.csv"):
        assert {"image_id", "patient_id", "answer", "answers"}.isdisjoint(pd.read_csv(path).columns), path.name
    # The same numbers in an order that identifies no image.
    for name in ("shap_beeswarm_field_BCC", "embedding"):
        known, anonymous = (pd.read_csv(one.pictures / f"{name}.csv") for one in (full, shared))
        known = known.drop(columns=["image_id", "answer"], errors="ignore")
        expected = known.sort_values(list(known.columns), ignore_index=True)
        pd.testing.assert_frame_equal(anonymous, expected)
        assert not known.equals(expected)
    for name in ("localisation", "shap_importance_field", "roc"):
        assert (shared.pictures / f"{name}.csv").read_bytes() == (full.pictures / f"{name}.csv").read_bytes()


def test_images_of_an_earlier_report_are_not_left_beside_one_without(
    shared: Page, full: Page, tiny_run: Run, image_run: Run
) -> None:
    personal = {stem for stem in full.stems if any(fnmatch(f"{stem}.png", pattern) for pattern in PERSONAL)}
    assert {stem.split("_")[0] for stem in personal} >= {"gallery", "gradcam", "shap", "reconstruction"}
    # And of the six classes only one was requested.
    assert {stem for stem in set(full.stems) - set(shared.stems) if not stem.startswith("shap_beeswarm")} == personal
    before = {path: path.read_bytes() for path in [full.file, *full.pictures.iterdir()]}
    options = ReportOptions(40, 6, 1, photographs=False)
    with pytest.raises(RunError, match=r"full/pictures holds \w+\.csv, which may show patients; .*--out"):
        write_report(tiny_run, full.file.parent, options=options)
    with pytest.raises(RunError, match="which may show patients"):
        write_explanations(image_run, full.pictures, options=options)
    assert {path: path.read_bytes() for path in [full.file, *full.pictures.iterdir()]} == before


# Runs that can't have all of it.


def test_a_run_that_reads_no_image(metadata_page: Page, metadata_run: Run) -> None:
    assert metadata_page.file == metadata_run.path / "report" / "report.html"
    examined = [name for name in EXAMINED if name != "out-of-distribution"]
    assert list(metadata_page.sections) == [*MEASURED, "shap", "tsne", *examined, "provenance"]
    assert "no image encoder, metadata M3; patient-disjoint split; seed 0" in metadata_page.root.words()
    assert [stem for stem in metadata_page.stems if stem.startswith("shap_waterfall_field_PAT_")]
    # One class was requested.
    assert [stem for stem in metadata_page.stems if "beeswarm" in stem] == ["shap_beeswarm_field_MEL"]
    assert "ImageNet" not in metadata_page.root.words()


def test_a_run_that_reads_no_metadata(image_run: Run, folder: Path) -> None:
    options = ReportOptions(20, 6, 1, label="MEL")
    page = Page(write_report(image_run, folder / "image_page", options=options))
    examined = [name for name in EXAMINED if name != "missing-metadata"]
    assert list(page.sections) == [*MEASURED, "gallery", "gradcam", "tsne", *examined, "provenance"]
    assert "no metadata; patient-disjoint split" in page.root.words() or "metadata M0" not in page.root.words()

    files = write_explanations(image_run, folder / "explanations", options=options)
    stems = [path.stem for path in files[::3]]
    assert [stem for stem in stems if not stem.startswith("gallery")] == ["gradcam", "localisation", "embedding"]
    for stem in stems:
        assert (folder / "explanations" / f"{stem}.csv").read_bytes() == (page.pictures / f"{stem}.csv").read_bytes()
    assert pd.concat([pd.read_csv(path) for path in page.pictures.glob("gallery_*.csv")])["answers"].isna().all()
    maps = pd.read_csv(page.pictures / "gradcam.csv")
    assert set(maps.loc[maps["column"] == "other", "class"]) == {"MEL"}


def test_a_section_that_cant_be_made_says_why_in_its_place(metadata_run: Run, tmp_path: Path) -> None:
    run = copied(metadata_run, tmp_path / "run")
    (run.path / "history.csv").unlink()
    page = Page(write_report(run, tmp_path / "page", explained=False))
    assert list(page.sections) == [*MEASURED, "provenance"]
    assert "has no history.csv" in page.intro("training")[0]


ELSEWHERE = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("captum", "shap"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from dualrefnet.errors import DependencyError
from dualrefnet.report.run_report import write_report
from dualrefnet.run import Run

run = Run(Path(sys.argv[1]))
print(write_report(run, explained=False))
assert not {"captum", "shap", "dualrefnet.report.explanations"} & set(sys.modules)
try:
    write_report(run)
except DependencyError as error:
    print(error)
"""


def copied(run: Run, path: Path, **changes: dict[str, Any]) -> Run:
    """Copy a run, with other values in sections of its recipe and in its metrics."""
    copy = Run(Path(shutil.copytree(run.path, path)))
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    write_json(copy.metrics_file, {**read_json(copy.metrics_file), **changes.pop("metrics", {})})
    changed = {**recipe, **{name: {**recipe[name], **values} for name, values in changes.items()}}
    write_yaml(path / "recipe.yaml", changed)
    # Trained as the recipe says.
    model = read_json(path / "model.json")
    model["architecture"]["section"] |= changes.get("model", {})
    model["metadata"]["section"] = changed["metadata"]
    model["dataset"]["name"] = changed["data"]["dataset"]
    write_json(path / "model.json", model)
    return copy


@pytest.fixture(scope="module")
def moved(tiny_run: Run, folder: Path) -> Run:
    """A run by the paper's protocol on another machine: no data, no model."""
    leak = {"patient": {"train": 0.493, "train_or_val": 0.554, "per_class": {}}, "lesion": None}
    run = copied(
        tiny_run,
        folder / "moved",
        data={"dataset": "pad_ufes_20", "protocol": "paper", "root": str(folder / "gone")},
        model={"backbone": "vgg13"},
        metrics={"drawn": False, "leakage": leak},
    )
    run.weights_file.unlink()
    return run


@pytest.fixture(scope="module")
def alone(moved: Run) -> Page:
    """The page without explanations, written where captum and shap aren't installed."""
    command = [sys.executable, "-c", ELSEWHERE, str(moved.path)]
    where = Path(dualrefnet.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=where)
    assert done.returncode == 0, done.stderr
    file, missing = done.stdout.splitlines()
    assert install_hint("explain") in missing
    return Page(Path(file))


def test_predictions_alone_need_neither_data_nor_captum_nor_shap(
    alone: Page, full: Page, moved: Run, tmp_path: Path
) -> None:
    assert list(alone.sections) == [*MEASURED, "provenance"]
    assert [alone.intro(key) for key in MEASURED] == [full.intro(key) for key in MEASURED]
    # To the last byte what the page with explanations has.
    assert alone.stems
    for path in alone.pictures.iterdir():
        assert path.read_bytes() == (full.pictures / path.name).read_bytes(), path.name
    with pytest.raises(DataError, match="gone"):
        write_report(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_by_the_papers_protocol_stands_beside_the_paper_if_it_is_its_experiment(
    alone: Page, moved: Run, image_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert alone.table("Test set")["head"] == ["measure", "this run"]
    assert "Comparison with the paper's Table 2" not in alone.root.words()
    words, test = alone.root.words(), int((moved.split["split"] == "test").sum())
    assert f"{test} of 383 test images" in words
    assert "image.size 32, not 224" in words
    assert "49% of the test images show a patient of the training split (55% with validation)" in words
    assert "Synthetic images" not in words
    assert "; the paper's split; seed 0" in words

    monkeypatch.setattr("dualrefnet.report.performance.departures", lambda recipe, split: [])
    measured = read_measured(moved)
    found = [item for item in (*summary_section(measured).items, *class_section(measured).items)]
    tables = {item.title: item for item in found if isinstance(item, PrintedTable)}
    table = tables["Test set"]
    assert table.columns == ("measure", "this run", "the paper")
    printed = {
        "balanced accuracy": "0.845",
        "accuracy": "0.851",
        "AUC, macro, one versus rest": "0.997",
        "Cohen's kappa": "0.800",
    }
    assert {name.text: theirs.text for name, _, theirs in table.rows} == {
        name.text: printed.get(name.text, "–") for name, *_ in table.rows
    }
    classes = {line[0].text: line for line in tables["Comparison with the paper's Table 2"].rows}
    assert [cell.small for cell in classes["MEL"][1:]] == ["paper 0.890", "paper 0.990", "paper 0.890", "paper 1.000"]
    assert any(
        "Table 2a: the NPVs of ACK, BCC and SCC repeat" in note
        for note in tables["Comparison with the paper's Table 2"].notes
    )

    # A backbone that the paper doesn't have.
    changes = {"data": {"dataset": "pad_ufes_20", "protocol": "paper"}, "model": {"backbone": "vit_b_16"}}
    measured = read_measured(copied(image_run, tmp_path / "run", **changes))
    tables = [*summary_section(measured).items, *class_section(measured).items]
    heads = [item.columns for item in tables if isinstance(item, PrintedTable)]
    assert heads == [("measure", "this run"), ("class", "sensitivity", "specificity", "PPV", "NPV", "AUC")]


# What can't be done is refused at once.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReportOptions(label="melanoma"), "there is no class melanoma; the classes are ACK, BCC, MEL, NEV, SCC, SEK"),
        (ReportOptions(masks=Path("no/such/folder")), "there is no folder of masks no/such/folder"),
        (ReportOptions(images=5), "5 images are too few for 6 classes"),
        (ReportOptions(shap_images=3), "3 images are too few for 6 classes"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    tiny_run: Run, tmp_path: Path, options: ReportOptions, message: str
) -> None:
    for write in (write_report, write_explanations):
        with pytest.raises(DataError, match=message):
            write(tiny_run, tmp_path / "page", options=options)
    assert not (tmp_path / "page").exists()
