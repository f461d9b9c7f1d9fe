import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import dualrefnet
from conftest import TINY
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.display.format import MEASURE_NAMES, PrintedTable
from dualrefnet.errors import DataError, RunError
from dualrefnet.files import read_json, write_json, write_yaml
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.run import Run
from read_page import Page, read

pytest.importorskip("captum")
pytest.importorskip("shap")

from dualrefnet.report import ReportOptions
from dualrefnet.report.performance import CLASS_MEASURES, HEADLINE, class_section, glance_section, read_measured
from dualrefnet.report.run_report import PERSONAL, compared_section, write_explanations, write_report

SMALL = ReportOptions(images=40, shap_images=6, each=1)
CANCERS = ["BCC", "MEL", "SCC"]
MEASURED = ["glance", "classes", "probabilities", "calibrated", "training"]
EXAMINED = ["subgroups", "shortcuts", "availability", "out_of_scope", "audit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def trained(sample_root: Path, folder: Path) -> Callable[[str, dict[str, float]], Run]:
    """Train another method on the split of `tiny_run`."""
    from dualrefnet.training.train import train_recipe

    def train(method: str, training: dict[str, float]) -> Run:
        recipe = load_recipe("sample", {"data.root": str(sample_root), **TINY, "model.method": method, **training})
        return train_recipe(recipe, folder / method)

    return train


@pytest.fixture(scope="module")
def image_run(trained: Callable[[str, dict[str, float]], Run]) -> Run:
    return trained("no_metadata", {"training.epochs": 1})


@pytest.fixture(scope="module")
def form_run(trained: Callable[[str, dict[str, float]], Run]) -> Run:
    """A run that has learned something, unlike the others: forms are learned in a second."""
    return trained("metadata_only", {"training.epochs": 30, "training.learning_rate": 0.003})


@pytest.fixture(scope="module")
def full(tiny_run: Run, image_run: Run, folder: Path) -> Page:
    """The page with all that there can be."""
    return read(write_report(tiny_run, folder / "full", against=image_run, options=SMALL))


@pytest.fixture(scope="module")
def shared(tiny_run: Run, form_run: Run, folder: Path) -> Page:
    """The page without photographs, to be sent on."""
    options = ReportOptions(SMALL.images, SMALL.shap_images, SMALL.each, label="BCC", photographs=False)
    return read(write_report(tiny_run, folder / "shared", against=form_run, options=options))


@pytest.fixture(scope="module")
def form_page(form_run: Run) -> Page:
    return read(write_report(form_run, options=ReportOptions(images=20, shap_images=6, each=1, label="MEL")))


@pytest.fixture(scope="module")
def image_page(image_run: Run) -> Page:
    return read(write_report(image_run, options=ReportOptions(images=20, shap_images=6, each=1, label="MEL")))


@pytest.fixture(params=["full", "shared", "form_page", "image_page"])
def page(request: pytest.FixtureRequest) -> Page:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Page)
    return found


def rows_of(run: Run) -> pd.DataFrame:
    return run.predictions.query("split == 'test'")


# The page as HTML.


def test_ids_are_unique_and_every_link_finds_its_place(page: Page) -> None:
    found = Counter(element.attributes["id"] for element in page.root.all() if "id" in element.attributes)
    assert [name for name, times in found.items() if times > 1] == []
    asked = [
        value
        for element in page.root.all()
        for name, value in element.attributes.items()
        if name in ("href", "xlink:href")
    ]
    asked += re.findall(r"url\((#[^)]+)\)", page.text)
    asked += [
        f"#{element.attributes['aria-labelledby']}"
        for element in page.root.all()
        if "aria-labelledby" in element.attributes
    ]
    places = {link[1:] for link in asked if link.startswith("#")}
    assert places <= set(found)
    assert {"glance", "glance-heading", "made"} <= places


def test_headings_are_in_order(page: Page) -> None:
    levels = [int(element.tag[1]) for element in page.root.all() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1, "a level is left out"
    assert all(element.words() for element in page.root.all() if re.fullmatch("h[1-6]", element.tag))
    # Each section has its heading, and stands in the list of contents.
    headings = [section.own("h2") or section.own("summary")[0].own("h2") for section in page.sections.values()]
    (contents,) = page.root.all("nav")
    assert [heading.words() for (heading,) in headings] == [link.words() for link in contents.all("a")]
    assert [f"#{key}" for key in page.sections] == [link.attributes["href"] for link in contents.all("a")]
    (html,) = page.root.own("html")
    assert html.attributes["lang"] == "en"
    assert page.text.startswith("<!DOCTYPE html>")


def test_who_doesnt_see_hears_what_pictures_say_and_which_cell_belongs_to_what(page: Page) -> None:
    pictures = list(page.root.all("svg"))
    assert len(pictures) == len(page.stems)
    for picture in pictures:
        assert picture.attributes["role"] == "img"
        title, _, alt = picture.attributes["aria-label"].partition(". ")
        assert title
        assert alt.strip(" .")
        figure = picture.parent
        assert figure is not None
        assert figure.tag == "figure"
        assert [heading.words() for heading in figure.own("h3")] == [title]
        assert len(figure.own("figcaption")[0].words()) > 40
    tables = list(page.root.all("table"))
    assert len(tables) >= 5
    for table in tables:
        head, *rows = table.all("tr")
        assert {cell.attributes["scope"] for cell in head.own("th")} == {"col"}
        assert not head.own("td")
        for row in rows:
            assert [cell.attributes["scope"] for cell in row.own("th")] == ["row"]
            assert len(row.own("th")) + len(row.own("td")) == len(head.own("th"))


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    for element in page.root.all():
        assert element.tag not in (
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "base",
            "form",
            "foreignobject",
        )
        for name, value in element.attributes.items():
            assert not name.startswith("on"), (element.tag, name)
            assert name not in ("src", "srcset", "action", "poster", "ping")
            if name in ("href", "xlink:href"):
                assert value.startswith(
                    ("#", "data:image/png;base64,", "data:image/jpeg;base64,", "data:text/csv;base64,")
                ), value[:60]
    assert "@import" not in page.text
    assert set(re.findall(r"url\((.)", page.text)) == {"#"}
    # Names of the languages, which nobody calls up.
    assert set(re.findall(r"https?://[^\"' <]+", page.text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    policy = [
        element.attributes.get("content", "") for element in page.root.all("meta") if "http-equiv" in element.attributes
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_text_has_the_ink_of_the_page(page: Page) -> None:
    for title, picture in page.svgs().items():
        fills = {
            (re.findall(r"fill: ([^;]+)", text.attributes["style"]) or ["black"])[0] for text in picture.all("text")
        }
        on_cells = {"black", "#ffffff"} if title in ("Confusion matrix", "Shares of each true class") else set()
        assert fills - on_cells == {"var(--ink)"}, title


def test_every_picture_lies_beside_the_page_three_times_and_its_numbers_in_it(page: Page) -> None:
    files = sorted(path.name for path in page.pictures.iterdir())
    assert files == sorted(f"{stem}.{suffix}" for stem in page.stems for suffix in ("png", "svg", "csv"))
    for stem in page.stems:
        assert (page.pictures / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (page.pictures / f"{stem}.svg").read_bytes()
    numbers = page.numbers()
    assert sorted(numbers) == [f"{stem}.csv" for stem in page.stems]
    for name, content in numbers.items():
        assert content == (page.pictures / name).read_bytes(), name
    assert sorted(path.name for path in page.file.parent.iterdir()) == ["pictures", "report.html"]


# What it says.


def test_tables_are_the_measures(full: Page, tiny_run: Run) -> None:
    metrics = tiny_run.metrics
    flat = {**metrics, **{f"malignant_{name}": value for name, value in metrics["malignant"].items()}}
    table = full.table("Measures on the test set")
    assert table.pop("head") == ["measure", "this run"]
    assert list(table) == [MEASURE_NAMES[name] for name in HEADLINE]
    for name in HEADLINE:
        bounds = flat.get(f"{name}_ci95")
        expected = f"{flat[name]:.3f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
        assert table[MEASURE_NAMES[name]] == [expected]
    assert float(table["balanced accuracy"][0][:5]) == pytest.approx(accuracy_by_class(tiny_run), abs=6e-4)

    table = full.table("Each class versus the rest, with 95% intervals")
    assert table.pop("head") == ["class", "sensitivity", "specificity", "PPV", "NPV"]
    support = rows_of(tiny_run)["label"].value_counts()
    for (first, cells), (label, values) in zip(table.items(), metrics["per_class"].items(), strict=True):
        assert first == f"{label} {tiny_run.model['dataset']['class_names'][label]}, {support[label]} images"
        for cell, measure in zip(cells, CLASS_MEASURES, strict=True):
            value, bounds = values[measure], values.get(f"{measure}_ci95")
            number = "–" if value is None else f"{value:.3f}"
            assert cell == (f"{number} [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else number)


def accuracy_by_class(run: Run) -> float:
    rows = rows_of(run)
    return float(balanced_accuracy_score(rows["label"], rows["predicted"]))


def test_sentences_are_the_predictions_counted(full: Page, tiny_run: Run) -> None:
    rows, metrics = rows_of(tiny_run), tiny_run.metrics
    patients = tiny_run.split.set_index("image_id")["patient_id"].loc[rows["image_id"]].nunique()
    right, cancer, called = (
        rows["label"] == rows["predicted"],
        rows["label"].isin(CANCERS),
        rows["predicted"].isin(CANCERS),
    )
    first, second, referred, _ = full.lead("glance")
    assert referred.startswith("Cancers referred: all that was recorded")
    low, high = metrics["accuracy_ci95"]
    assert first.startswith(
        f"On {len(rows)} test photographs of {patients} patients the likeliest class was the right one {right.sum()} times: "
        f"{accuracy_score(rows['label'], rows['predicted']):.0%} [{low:.0%} to {high:.0%}]. "
    )
    assert f" it is {accuracy_by_class(tiny_run):.0%} [" in first
    assert first.endswith("(balanced accuracy; guessing gives 17%).")
    assert second.startswith(
        f"Of {cancer.sum()} photographs of cancers (BCC, MEL, SCC) {(cancer & called).sum()} were given a class"
    )
    assert f"right one: {(cancer & called).sum() / cancer.sum():.0%} [" in second
    assert f"Of {(~cancer).sum()} of benign lesions {(~cancer & ~called).sum()} were given a benign class" in second
    assert f"class: {(~cancer & ~called).sum() / (~cancer).sum():.0%} [" in second
    assert full.lead("probabilities")[0].endswith(f"the mean distance between the two, is {metrics['ece']:.2f}.")
    history = tiny_run.history.sort_values(
        ["val_balanced_accuracy", "val_loss", "epoch"], ascending=[False, True, True]
    )
    assert full.lead("training")[0].startswith(
        f"2 epochs; kept is epoch {history['epoch'].iloc[0]}, the one with the highest balanced"
    )


def test_numbers_of_the_explanations_are_those_of_their_pictures(full: Page) -> None:
    localised = (
        pd.read_csv(full.pictures / "localisation.csv").set_index(["class", "measure"]).loc[("all images", "energy")]
    )
    sentence = full.lead("where")[1]
    assert (
        f" {localised['value']:.0%} [{localised['low']:.0%} to {localised['high']:.0%}] of the heat lies in the lesion"
        in sentence
    )
    assert f"({localised['baseline']:.0%})" in sentence
    assert sentence.endswith(f"Even heat would have {localised['area']:.0%}.")
    mean = pd.read_csv(full.pictures / "reconstruction.csv")[["psnr", "psnr_flat"]].mean()
    better = "better" if mean["psnr"] > mean["psnr_flat"] else "no better"
    assert full.lead("auxiliary")[0].endswith(
        f"By PSNR it is {better} than an area of the target's mean colour: {mean['psnr']:.1f} against {mean['psnr_flat']:.1f} dB."
    )


def test_sections_of_a_run_that_has_everything(full: Page, tiny_run: Run) -> None:
    assert list(full.sections) == [
        *MEASURED,
        "gallery",
        "where",
        "form",
        "features",
        "auxiliary",
        *EXAMINED,
        "against",
        "made",
    ]
    predictions = rows_of(tiny_run)
    # One right and one wrong of each class, where there is one.
    kinds = predictions.assign(right=predictions["label"] == predictions["predicted"])[
        ["label", "right"]
    ].drop_duplicates()
    shown = pd.concat(
        [pd.read_csv(full.pictures / f"gallery_{name}.csv") for name in sorted(set(predictions["label"]))]
    )
    assert len(shown) == len(kinds)
    assert set(shown["image_id"]) <= set(predictions["image_id"])
    assert len(list(full.sections["gallery"].all("image"))) == 2 * len(kinds)
    assert [title for title in full.svgs() if title.startswith("What speaks for and against")] == [
        f"What speaks for and against {name}" for name in ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")
    ]
    assert {f"shap_importance_{by}" for by in ("field", "column")} <= set(full.stems)
    assert pd.read_csv(full.pictures / "shap_beeswarm_field_MEL.csv")["image_id"].nunique() == SMALL.shap_images
    assert set(rows_of(tiny_run)["image_id"]) == set(pd.read_csv(full.pictures / "embedding.csv")["image_id"])


def test_a_drawn_data_set_is_said_to_be_drawn_and_the_recipe_is_there(page: Page) -> None:
    (notes,) = [element for element in page.root.all("div") if element.attributes.get("role") == "note"]
    assert "Drawn pictures of invented lesions" in notes.words()
    (footer,) = page.root.all("footer")
    assert "Not a medical device" in footer.words()
    assert "photographs of patients" not in footer.words()
    (recipe,) = page.root.all("pre")
    made = Recipe.model_validate(yaml.safe_load("".join(str(part) for part in recipe.parts)))
    assert made.data.dataset == "sample"
    assert made.image.size == 32
    assert page.table("Photographs")["total"] == ["72", "23", "25"]


def test_a_second_run_stands_beside_with_its_balanced_accuracy(full: Page, tiny_run: Run, image_run: Run) -> None:
    ours, theirs = accuracy_by_class(tiny_run), accuracy_by_class(image_run)
    sentence = full.lead("against")[0]
    assert sentence.startswith(
        f"Both runs on the 25 test photographs that they share: balanced accuracy {ours:.3f} of DualRefNet and {theirs:.3f} of No metadata;"
    )
    assert full.sections["against"].own("h2")[0].words() == "Beside No metadata"
    pictures = [picture.attributes["aria-label"].split(". ")[0] for picture in full.sections["against"].all("svg")]
    assert pictures[:2] == ["Fused features of the test images", "How well the classes are apart"]
    a, b = rows_of(tiny_run), rows_of(image_run).set_index("image_id").loc[rows_of(tiny_run)["image_id"]]
    differ = ((a["predicted"].to_numpy() == a["label"].to_numpy()) != (b["predicted"] == b["label"]).to_numpy()).any()
    assert ("Where DualRefNet and No metadata differ" in pictures) == differ
    runs = pd.read_csv(full.pictures / "embeddings.csv").groupby("run").size()
    assert runs.to_dict() == {"DualRefNet": 25, "No metadata": 25}


def test_the_better_run_of_two_is_named_and_shown_where_it_is_right(tiny_run: Run, form_run: Run) -> None:
    ours, theirs = accuracy_by_class(tiny_run), accuracy_by_class(form_run)
    assert theirs - ours > 0.15, "the form tells much"
    section = compared_section(open_run(tiny_run), open_run(form_run), SMALL)
    sentence, *separation = section.lead
    found = re.fullmatch(
        r"Both runs on the 25 test photographs that they share: balanced accuracy ([\d.]+) of DualRefNet and ([\d.]+) of Metadata only; "
        r"difference (−[\d.]+) \[(−[\d.]+), ([−+][\d.]+)\], p = ([\d.]+): (.+)\.",
        sentence,
    )
    assert found, sentence
    a, b, difference, low, high, p = (float(value.replace("−", "-")) for value in found.groups()[:6])
    assert (a, b, difference) == pytest.approx((ours, theirs, ours - theirs), abs=6e-4)
    assert low < difference < high
    assert found[7] == (
        "Metadata only is better on these data"
        if high < 0
        else "the interval holds 0, so it can't be told which is better"
    )
    assert (p < 0.05) == (high < 0) or high == pytest.approx(0, abs=0.02)
    assert len(separation) == 3
    assert [picture.name for picture in section.pictures] == ["embeddings", "separation", "disagreement"]
    cases = section.pictures[2].data
    assert list(cases["run"][:2]) == ["DualRefNet", "Metadata only"]
    for run, rows in ((tiny_run, cases[::2]), (form_run, cases[1::2])):
        known = rows_of(run).set_index("image_id").loc[rows["image_id"]]
        assert list(rows["predicted"]) == list(known["predicted"])
        np.testing.assert_allclose(
            rows["probability_of_true_class"],
            [known.loc[row["image_id"], f"prob_{row['label']}"] for _, row in rows.iterrows()],
        )
    right = (cases["predicted"] == cases["label"]).to_numpy()
    assert (right[::2] != right[1::2]).all()
    # Three of each kind at most, first those that the first run gets right.
    assert list(right[::2]) == sorted(right[::2], reverse=True)
    assert 1 <= right[1::2].sum() <= 3
    assert "Metadata only reads no photograph" in section.pictures[2].caption


# Without photographs.


def test_without_photographs_no_image_is_shown_or_named(shared: Page, full: Page, tiny_run: Run) -> None:
    assert list(shared.sections) == [*MEASURED, "where", "form", "features", "auxiliary", *EXAMINED, "against", "made"]
    # The only pixels are the scales beside the points, which are long and narrow.
    for title, picture in shared.svgs().items():
        scales = list(picture.all("image"))
        assert len(scales) == title.startswith("What speaks for and against"), title
        assert all(float(scale.attributes["width"]) > 10 * float(scale.attributes["height"]) for scale in scales)
    split = tiny_run.split
    names = set(split["image_id"]) | set(split["patient_id"])
    assert any(name in full.text for name in split["image_id"]), "ids are looked for in the wrong way"
    texts = {path.name: path.read_text() for path in shared.pictures.iterdir() if path.suffix in (".csv", ".svg")}
    texts |= {f"in the page: {name}": content.decode() for name, content in shared.numbers().items()}
    texts["page"] = shared.text
    for where, text in texts.items():
        assert not [name for name in names if name in text], where
        assert "PAT_" not in text, where
    for path in shared.pictures.glob("*.csv"):
        assert {"image_id", "patient_id", "answer", "answers"}.isdisjoint(pd.read_csv(path).columns), path.name


def test_without_photographs_the_numbers_are_the_same_in_an_order_that_tells_nothing(shared: Page, full: Page) -> None:
    for name in ("shap_beeswarm_field_BCC", "embedding"):
        known, anonymous = (pd.read_csv(one.pictures / f"{name}.csv") for one in (full, shared))
        known = known.drop(columns=["image_id", "answer"], errors="ignore")
        expected = known.sort_values(list(known.columns), ignore_index=True)
        pd.testing.assert_frame_equal(anonymous, expected)
        assert not known.equals(expected)
    for name in ("localisation", "shap_importance_field", "roc"):
        assert (shared.pictures / f"{name}.csv").read_bytes() == (full.pictures / f"{name}.csv").read_bytes()
    assert shared.lead("where") == full.lead("where")
    assert shared.lead("auxiliary") == full.lead("auxiliary")


def test_photographs_of_an_earlier_report_are_not_left_beside_one_without(
    shared: Page, full: Page, tiny_run: Run, image_run: Run
) -> None:
    personal = {stem for stem in full.stems if any(fnmatch(f"{stem}.png", pattern) for pattern in PERSONAL)}
    assert {stem.split("_")[0] for stem in personal} >= {"gallery", "gradcam", "shap", "reconstruction"}
    # And of the six classes only one was asked for.
    assert {stem for stem in set(full.stems) - set(shared.stems) if not stem.startswith("shap_beeswarm")} == personal
    before = {path: path.read_bytes() for path in [full.file, *full.pictures.iterdir()]}
    options = ReportOptions(40, 6, 1, photographs=False)
    with pytest.raises(RunError, match=r"full/pictures holds \w+\.csv, perhaps with photographs; .*--out"):
        write_report(tiny_run, full.file.parent, options=options)
    with pytest.raises(RunError, match="perhaps with photographs"):
        write_explanations(image_run, full.pictures, options=options)
    assert {path: path.read_bytes() for path in [full.file, *full.pictures.iterdir()]} == before


# Runs that can't have all of it.


def test_a_run_that_reads_no_photograph(form_page: Page, form_run: Run) -> None:
    assert form_page.file == form_run.path / "report" / "report.html"
    examined = [name for name in EXAMINED if name != "out_of_scope"]
    assert list(form_page.sections) == [*MEASURED, "form", "features", *examined, "made"]
    (subtitle,) = [
        element.words() for element in form_page.root.all("p") if element.attributes.get("class") == "subtitle"
    ]
    assert subtitle == "no image encoder, metadata M3; patients apart; seed 0"
    assert not [
        stem for stem in form_page.stems if stem.startswith(("gallery", "gradcam", "localisation", "reconstruction"))
    ]
    assert [stem for stem in form_page.stems if stem.startswith("shap_waterfall_field_PAT_")]
    # One class was asked for.
    assert [stem for stem in form_page.stems if stem.startswith("shap_beeswarm")] == ["shap_beeswarm_field_MEL"]
    assert "ImageNet" not in form_page.root.words()
    assert form_page.table("Measures on the test set")["accuracy"][0].startswith(f"{form_run.metrics['accuracy']:.3f}")


def test_a_run_that_reads_no_form(image_page: Page, image_run: Run) -> None:
    examined = [name for name in EXAMINED if name != "availability"]
    assert list(image_page.sections) == [*MEASURED, "gallery", "where", "features", *examined, "made"]
    assert not [stem for stem in image_page.stems if stem.startswith(("shap", "reconstruction"))]
    assert "SHAP" not in image_page.text
    galleries = pd.concat([pd.read_csv(path) for path in image_page.pictures.glob("gallery_*.csv")])
    assert galleries["answers"].isna().all()
    # The class that was asked for is in the last column of every row.
    heats = pd.read_csv(image_page.pictures / "gradcam.csv")
    assert set(heats.loc[heats["column"] == "other", "class"]) == {"MEL"}
    assert "the last column is class MEL" in image_page.sections["where"].words()


def test_explanations_alone_are_files(image_run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ReportOptions(images=20, shap_images=6, photographs=False)
    files = write_explanations(image_run, folder / "explanations", options=options)
    assert sorted(path.name for path in (folder / "explanations").iterdir()) == sorted(path.name for path in files)
    assert [path.name for path in files] == [
        f"{stem}.{suffix}" for stem in ("localisation", "embedding") for suffix in ("png", "svg", "csv")
    ]
    assert list(pd.read_csv(folder / "explanations" / "embedding.csv").columns) == ["class", "x", "y", "run"]
    assert "What its features separate: embedding" in capsys.readouterr().err


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
assert not {"captum", "shap", "dualrefnet.analysis.gradcam", "dualrefnet.report.explanations"} & set(sys.modules)
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
    write_yaml(
        path / "recipe.yaml", {**recipe, **{name: {**recipe[name], **values} for name, values in changes.items()}}
    )
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
    """The page of what the predictions say, written where captum and shap aren't installed."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(moved.path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(dualrefnet.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    where, missing = done.stdout.splitlines()
    assert "pip install 'dualrefnet[explain]'" in missing
    return read(Path(where))


def test_what_the_predictions_say_needs_neither_data_nor_captum_nor_shap(
    alone: Page, full: Page, moved: Run, tmp_path: Path
) -> None:
    assert list(alone.sections) == [*MEASURED, "made"]
    assert [alone.lead(key) for key in MEASURED] == [full.lead(key) for key in MEASURED]
    # To the last byte what the page with explanations has.
    assert alone.stems
    for stem in alone.stems:
        for suffix in ("png", "svg", "csv"):
            assert (alone.pictures / f"{stem}.{suffix}").read_bytes() == (
                full.pictures / f"{stem}.{suffix}"
            ).read_bytes(), stem
    with pytest.raises(DataError, match="gone"):
        write_report(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_by_the_papers_protocol_stands_beside_the_paper(alone: Page, tiny_run: Run) -> None:
    table = alone.table("Measures on the test set")
    assert table["head"] == ["measure", "this run", "the paper"]
    printed = {
        "balanced accuracy": "0.845",
        "accuracy": "0.851",
        "AUC, macro, one versus rest": "0.997",
        "Cohen's kappa": "0.800",
    }
    del table["head"]
    for name, (ours, theirs) in table.items():
        assert theirs == printed.get(name, "–"), name
        assert re.match(r"\d\.\d{3}( \[|$)", ours)
    classes = alone.table("Beside the paper's Table 2")
    source = Path(dualrefnet.__file__).parent / "suite" / "reported" / "reported_per_class.csv"
    paper = pd.read_csv(source).query("dataset == 'pad_ufes_20'").set_index(["class", "metric"])["value"]
    assert classes["head"] == ["class", "sensitivity", "specificity", "PPV", "NPV"]
    for label, values in tiny_run.metrics["per_class"].items():
        expected = [
            ("–" if values[name] is None else f"{values[name]:.3f}", f"paper {paper[label, name]:.3f}")
            for name in CLASS_MEASURES
        ]
        assert classes[label] == [" ".join(cell) for cell in expected]
    words = alone.root.words()
    assert "The paper's figures come from one training each, without intervals." in words
    assert "Table 2a: the NPVs of ACK, BCC and SCC repeat the specificities" in words
    assert (
        "The split leaks: 49% of the test photographs show a patient that training has seen (55% with validation)."
        in words
    )
    assert "Drawn pictures" not in words
    assert "; the paper's split; seed 0" in words
    # Without explanations there is nothing of a patient to warn of.
    assert "photographs of patients and answers" not in words


def test_a_competitor_whose_backbone_the_paper_doesnt_have_stands_alone(image_run: Run, tmp_path: Path) -> None:
    changes = {"data": {"dataset": "pad_ufes_20", "protocol": "paper"}, "model": {"backbone": "vit_b_16"}}
    measured = read_measured(copied(image_run, tmp_path / "run", **changes))
    tables = [item for section in (glance_section(measured), class_section(measured, 20, 0)) for item in section.items]
    assert [item.columns for item in tables if isinstance(item, PrintedTable)] == [
        ("measure", "this run"),
        ("class", "sensitivity", "specificity", "PPV", "NPV"),
    ]


# What can't be done is said at once.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReportOptions(label="melanoma"), "there is no class melanoma; the classes are ACK, BCC, MEL, NEV, SCC, SEK"),
        (ReportOptions(masks=Path("no/such/folder")), "there is no folder of masks no/such/folder"),
        (ReportOptions(images=5), "5 images can't show 6 classes"),
        (ReportOptions(shap_images=3), "3 images can't show 6 classes"),
    ],
)
def test_wishes_that_cant_be_met_are_refused_before_anything_is_written(
    tiny_run: Run, tmp_path: Path, options: ReportOptions, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_report(tiny_run, tmp_path / "page", options=options)
    with pytest.raises(DataError, match=message):
        write_explanations(tiny_run, tmp_path / "page", options=options)
    assert not (tmp_path / "page").exists()


def test_masks_of_other_images_are_refused(tiny_run: Run, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    with pytest.raises(DataError, match="holds no mask; name them"):
        write_report(tiny_run, tmp_path / "page", options=ReportOptions(masks=masks))
    train = tiny_run.split.query("split == 'train'")["image_id"].iloc[0]
    shutil.copy(Path(str(tiny_run.recipe.data.root)) / "masks" / f"{train}.png", masks)
    with pytest.raises(DataError, match="holds no mask of a test image"):
        write_report(tiny_run, tmp_path / "page", options=ReportOptions(masks=masks))
    assert not (tmp_path / "page").exists()


def test_runs_that_cant_be_compared_are_refused(tiny_run: Run, form_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "page"
    for same in (tiny_run, Run(tiny_run.path / ".." / tiny_run.path.name)):
        with pytest.raises(RunError, match="can't be compared with itself"):
            write_report(tiny_run, out, against=same)
    with pytest.raises(RunError, match="--against needs the explanations"):
        write_report(tiny_run, out, against=form_run, explained=False)
    other = copied(form_run, tmp_path / "other")
    predictions = other.predictions
    predictions["image_id"] = "other_" + predictions["image_id"]
    predictions.to_csv(other.path / "predictions.csv", index=False)
    with pytest.raises(RunError, match="share no test image"):
        write_report(tiny_run, out, against=other)
    (other.path / "metrics.json").unlink()
    for runs in ((other, None), (tiny_run, other)):
        with pytest.raises(RunError, match="isn't a finished run"):
            write_report(runs[0], out, against=runs[1])
    assert not out.exists()
