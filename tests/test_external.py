"""External tests: `evaluate --on`, and images of one lesion that count once."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import balanced_accuracy_score

from bundle_folder import write_bundle
from dualrefnet.analysis.evaluate import evaluate_run, measure_aggregated
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.pad_ufes_20 import SCHEMA
from dualrefnet.data.schema import Dataset, DatasetSchema
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.deploy.external import evaluate_external, find_seen, load_external, map_classes
from dualrefnet.deploy.predictor import Predictor
from dualrefnet.errors import DataError
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.run import Run
from test_cli import call, error_of  # noqa: F401 (a fixture)
from test_evaluate import with_test_images

WORDS = {"MEL": "melanoma", "NEV": "NV", "BCC": "bcc", "ACK": "wart"}


@pytest.fixture(scope="session")
def other_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of other patients than the run's; don't change it."""
    return make_synthetic(tmp_path_factory.mktemp("other") / "data", images=60, seed=9, side=64)


@pytest.fixture
def clinic(other_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with a table of its own: other labels, three fields, and images of the other sample."""

    def make(change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table, **description: object) -> Path:
        table = pd.read_csv(other_root / "metadata.csv", dtype=str)
        table = table[table["diagnostic"].isin(WORDS)].assign(kind=table["diagnostic"].map(WORDS))
        table = change(table[["img_id", "kind", "patient_id", "age", "region", "itch"]])
        root = tmp_path / "Other clinic"
        shutil.copytree(other_root / "images", root / "images", copy_function=os.link)
        table.to_csv(root / "table.csv", index=False)
        fields = [{"name": "age", "kind": "numeric", "unit": "years", "subgroup": True}]
        fields += [{"name": "region", "kind": "categorical"}]
        told = {"images": "images", "image": "img_id", "label": "kind", "patient": "patient_id", "metadata": fields}
        (root / "dataset.yaml").write_text(yaml.safe_dump({"title": "Other clinic", **told, **description}))
        return root

    return make


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(tiny_run.path, tmp_path / "run", copy_function=os.link)))


def test_a_run_is_measured_on_another_data_set_as_it_is_deployed(run: Run, other_root: Path) -> None:
    before = (run.path / "metrics.json").read_bytes()
    result = call("evaluate", run.path, "--on", "sample", "--root", other_root)
    assert result.exit_code == 0, result.output
    assert "external test set" in result.output
    out = run.path / "external" / "sample"
    metrics, table = json.loads((out / "metrics.json").read_text()), pd.read_csv(out / "predictions.csv")
    dataset = load_dataset("sample", other_root)
    assert list(table["image_id"]) == list(dataset.table["image_id"])
    assert metrics["support"] == len(table) == 60
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(table["label"], table["predicted"]))
    low, high = metrics["balanced_accuracy_ci95"]
    assert low <= metrics["balanced_accuracy"] <= high
    assert metrics["bootstrap"]["groups"] == dataset.table["patient_id"].nunique()
    # The same as the predictor gives for one image.
    row = dataset.table.iloc[7]
    metadata = {name: row[name] for name in (field.name for field in dataset.schema.fields) if pd.notna(row[name])}
    one = Predictor.load(run).predict(row["image_path"], metadata)
    assert table.loc[7, [f"prob_{name}" for name in one.probabilities]].tolist() == pytest.approx(
        list(one.probabilities.values()), abs=1e-5
    )
    assert metrics["deployed"]["coverage"] == pytest.approx(
        np.mean(
            [label in likely.split() for label, likely in zip(table["label"], table["likely"].fillna(""), strict=True)]
        )
    )
    assert metrics["deployed"]["cancers_referred"] == pytest.approx(
        table.loc[table["label"].isin(SCHEMA.malignant), "refer"].mean()
    )
    assert len(pd.read_csv(out / "subgroups.csv"))
    assert (run.path / "metrics.json").read_bytes() == before


def test_a_table_with_other_labels_and_fewer_fields_is_mapped_and_says_what_it_lacks(
    tiny_run: Run, clinic: Callable[..., Path], tmp_path: Path
) -> None:
    odd = clinic(lambda table: table.assign(region=table["region"].where(table.index > 20, "MOON")))
    dataset = load_external(str(odd), None)
    metrics = evaluate_external(tiny_run.path, dataset, tmp_path / "out", ["NEV=NV"])
    # By its name in words, by --map, by another spelling; a wart is no class of the model.
    assert metrics["classes"] == {"melanoma": "MEL", "NV": "NEV", "bcc": "BCC"}
    counts = dataset.table["label"].value_counts()
    assert metrics["left_out"] == {"wart": counts["wart"]}
    assert metrics["support"] == len(dataset.table) - counts["wart"]
    assert {name for name, one in metrics["per_class"].items() if one["support"]} == {"MEL", "NEV", "BCC"}
    # `itch` is a column that the description doesn't name.
    named = {field["name"] for field in tiny_run.model["metadata"]["fields"]}
    assert set(metrics["missing_fields"]) == named - {"age", "region", "itch"}
    remarks = " ".join(metrics["remarks"])
    for words in ("wart", "region: ", "smoke", "ACK, SCC, SEK"):
        assert words in remarks


def test_images_that_cannot_be_read_are_left_out(tiny_run: Run, clinic: Callable[..., Path], tmp_path: Path) -> None:
    root = clinic()
    images = [root / "images" / name for name in pd.read_csv(root / "table.csv")["img_id"]]
    for path, content in zip(images[:2], (b"not an image", None), strict=True):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    metrics = evaluate_external(tiny_run.path, load_external(str(root), None), tmp_path / "out")
    assert metrics["support"] == len(images) - 2 - metrics["left_out"].get("NV", 0) - metrics["left_out"].get("wart", 0)
    remarks = " ".join(metrics["remarks"])
    assert "1 rows without an image" in remarks
    assert f"the first, {images[0].stem}" in remarks


def test_images_and_patients_of_the_training_are_refused_unless_that_is_accepted(
    tiny_run: Run, sample_root: Path, tmp_path: Path
) -> None:
    dataset = load_external("sample", sample_root)
    with pytest.raises(DataError, match=r"were seen in the training .*--allow-seen"):
        evaluate_external(tiny_run.path, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    metrics = evaluate_external(tiny_run.path, dataset, tmp_path / "out", allow_seen=True)
    trained = int((tiny_run.split["split"] != "test").sum())
    assert metrics["seen"]["images"] == trained
    assert any(f"{trained} images" in remark and "--allow-seen" in remark for remark in metrics["remarks"])
    # Of the run's own test images nothing was seen.
    test = dataset.table["image_id"].isin(tiny_run.split.query("split == 'test'")["image_id"])
    own = dataclasses.replace(dataset, table=dataset.table[test].reset_index(drop=True), other_columns=pd.DataFrame())
    metrics = evaluate_external(tiny_run.path, own, tmp_path / "own")
    assert metrics["seen"] == {"images": 0, "patients": 0, "unknown": ""}
    assert metrics["accuracy"] == pytest.approx(tiny_run.metrics["accuracy"])


def test_a_copy_under_another_name_gives_its_patient_away(
    tiny_run: Run, sample_root: Path, clinic: Callable[..., Path], tmp_path: Path
) -> None:
    root = clinic()
    table = pd.read_csv(root / "table.csv")
    twice = table["patient_id"].duplicated(keep=False).to_numpy().argmax()
    trained = tiny_run.split.query("split == 'train'")["image_id"].iloc[0]
    copy = root / "images" / table["img_id"][twice]
    copy.unlink()
    shutil.copy(sample_root / "images" / f"{trained}.png", copy)
    dataset = load_external(str(root), None)
    of_patient = int((table["patient_id"] == table["patient_id"][twice]).sum())
    with pytest.raises(DataError, match=f"1 images, and {of_patient - 1} others of their patients, .* {copy.stem}"):
        evaluate_external(tiny_run.path, dataset, tmp_path / "out", [f"ACK={WORDS['ACK']}", "NEV=NV"])


def test_within_one_data_set_ids_tell_what_was_seen_also_without_the_training_images(
    tiny_run: Run, other_root: Path, tmp_path: Path
) -> None:
    gone = Run(Path(shutil.copytree(tiny_run.path, tmp_path / "gone", copy_function=os.link)))
    recipe = yaml.safe_load((gone.path / "recipe.yaml").read_text())
    recipe["data"]["root"] = str(tmp_path / "nowhere")
    (gone.path / "recipe.yaml").unlink()
    (gone.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    dataset = load_dataset("sample", other_root)
    # A sample's ids mean nothing; those of other data sets do.
    real = dataclasses.replace(dataset, schema=dataset.schema.model_copy(update={"synthetic": False}))
    group = dataset.table["patient_id"]
    assert not find_seen(gone, dataset, dataset.table, group).images.any()
    seen = find_seen(gone, real, real.table, group)
    trained = gone.split.query("split != 'test'")
    assert list(seen.images) == list(dataset.table["image_id"].isin(trained["image_id"]))
    assert list(seen.images | seen.patients) == list(group.isin(trained["patient_id"]) | seen.images)
    assert "nowhere" in seen.unknown


def test_what_a_run_started_from_has_seen_counts_too(
    tiny_run: Run, sample_root: Path, other_root: Path, tmp_path: Path
) -> None:
    # A run on other data that started from `tiny_run`; only what is recorded of it matters.
    started = Run(Path(shutil.copytree(tiny_run.path, tmp_path / "started", copy_function=os.link)))
    recipe = yaml.safe_load((started.path / "recipe.yaml").read_text())
    recipe["data"]["root"] = str(other_root)
    split = tiny_run.split.assign(image_id="x" + tiny_run.split["image_id"])
    dataset = load_dataset("sample", sample_root)
    trained = dataset.table["image_id"].isin(tiny_run.split.query("split != 'test'")["image_id"])
    for start, expected in ((str(tiny_run.path), trained), (str(tmp_path / "gone"), trained & False)):
        recipe["model"] |= {"init_from": start, "weights": "auto"}
        for name, text in (("recipe.yaml", yaml.safe_dump(recipe)), ("split.csv", split.to_csv(index=False))):
            (started.path / name).unlink()
            (started.path / name).write_text(text)
        model = json.loads((tiny_run.path / "model.json").read_text())
        model["architecture"]["section"] |= {"init_from": start, "weights": "auto"}
        (started.path / "model.json").unlink()
        (started.path / "model.json").write_text(json.dumps(model))
        seen = find_seen(started, dataset, dataset.table, dataset.table["patient_id"])
        assert list(seen.images) == list(expected)
        assert ("gone" in seen.unknown) == ("gone" in start)


def test_a_bundle_is_measured_too_and_says_what_it_cannot_know(other_root: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    mapping = ["DARK=MEL", "BRIGHT=NEV"]
    with pytest.raises(DataError, match="--out"):
        evaluate_external(bundle, load_dataset("sample", other_root), None, mapping)
    metrics = evaluate_external(bundle, load_dataset("sample", other_root), tmp_path / "out", mapping)
    assert set(metrics["classes"].values()) == {"DARK", "BRIGHT"}
    assert "bundle" in metrics["seen"]["unknown"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["MEL"], r"isn't CLASS=LABEL"),
        (["melanoma=MEL"], r"did you mean MEL=melanoma\?"),
        (["MEL=melanom"], r"did you mean 'melanoma'\?"),
        (["MLE=melanoma"], r"did you mean 'MEL'\?"),
        (["MEL=wart", "NEV=wart"], "gives wart two classes, MEL and NEV"),
    ],
)
def test_a_wrong_map_says_what_was_meant(given: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        map_classes(schema_of("melanoma", "wart"), SCHEMA.classes, SCHEMA.class_names, {}, given)
    assert "\n" not in str(refused.value)


def schema_of(*classes: str, **names: str) -> DatasetSchema:
    return DatasetSchema(name="csv_table", title="Other", classes=classes, class_names=names)


def test_classes_go_by_name_by_their_names_in_words_and_by_their_group() -> None:
    from dualrefnet.data.isic_2019 import SCHEMA as ISIC

    # ACK and AK are both actinic keratosis.
    expected = {"MEL": "MEL", "BCC": "BCC", "AK": "ACK", "SCC": "SCC"}
    assert map_classes(ISIC, SCHEMA.classes, SCHEMA.class_names, {}) == expected
    assert map_classes(ISIC, SCHEMA.classes, SCHEMA.class_names, {}, ["NEV=NV"])["NV"] == "NEV"
    grouped = {"malignant": ("BCC", "MEL", "SCC"), "benign": ("ACK", "NEV", "SEK")}
    assert map_classes(SCHEMA, tuple(grouped), {}, grouped)["MEL"] == "malignant"
    with pytest.raises(DataError, match=r"no label of Other .* is a class of the model"):
        map_classes(schema_of("wart"), SCHEMA.classes, SCHEMA.class_names, {})


def test_what_cannot_be_an_external_test_is_one_clear_line(
    tiny_run: Run,
    clinic: Callable[..., Path],
    tmp_path: Path,
    error_of: Callable[..., str],  # noqa: F811
) -> None:
    root = clinic(lambda table: table.assign(patient_id="P1"))
    out = ("--out", tmp_path / "out")
    expected = {
        ("--on", tmp_path / "nowhere"): "neither a folder with dataset.yaml nor a data set",
        ("--on", tmp_path): "there is no description",
        ("--on", root, "--root", root): "leave out --root",
        ("--on", root, *out): "of 1 patients: two are needed",
        ("--on", root, "--map", "MEL:melanoma"): "isn't CLASS=LABEL",
        ("--on", root, "--cache", tmp_path): "--cache has no effect with --on",
        ("--map", "MEL=melanoma"): "--map has no effect without --on",
        ("--allow-seen",): "--allow-seen has no effect without --on",
    }
    for arguments, words in expected.items():
        assert words in error_of("evaluate", tiny_run.path, *arguments), arguments
    (root / "dataset.yaml").write_text((root / "dataset.yaml").read_text().replace("images: images", "images: empty"))
    assert "no image of the" in error_of("evaluate", tiny_run.path, "--on", root)


# Several images of one lesion.

ROWS = pd.DataFrame(
    {
        "patient_id": ["P1", "P1", "P1", "P2", "P2", "P3", "P3", None],
        "lesion_id": ["L1", "L1", "L2", "L1", "L1", None, None, None],
    }
)
LABELS = np.array([0, 0, 1, 1, 1, 0, 0, 1])
FIRST = np.array([0.9, 0.3, 0.4, 0.2, 0.6, 0.7, 0.1, 0.5])


def aggregated(by: str, rows: pd.DataFrame = ROWS, labels: np.ndarray = LABELS) -> dict:
    bootstrap = Bootstrap([f"{row}" for row in rows["patient_id"].fillna("?")], 20)
    return measure_aggregated(by, rows, labels, np.stack([FIRST, 1 - FIRST], axis=1), bootstrap, ("A", "B"), ("A",))


def test_a_lesion_counts_once_by_the_mean_of_its_images() -> None:
    # P1/L1 .6 right, P1/L2 .4 right, P2/L1 .4 right, the images of P3 alone, .7 right and .1 wrong, and the last, .5.
    found = aggregated("lesion")
    assert (found["support"], found["images"], found["left_out"]) == (6, 8, 0)
    assert found["confusion_matrix"] == [[2, 1], [1, 2]]
    assert found["bootstrap"]["groups"] == 4


def test_one_whose_images_have_different_labels_is_left_out() -> None:
    # P1 has both labels; P2 .4, P3 .4 wrong, and the image without a patient.
    found = aggregated("patient")
    assert (found["support"], found["images"], found["left_out"]) == (3, 5, 1)
    assert found["confusion_matrix"] == [[0, 1], [1, 1]]
    assert any("1 patients are left out" in remark for remark in found["remarks"])


def test_what_cannot_be_aggregated_is_refused() -> None:
    with pytest.raises(DataError, match="names no lesion"):
        aggregated("lesion", ROWS.assign(lesion_id=None))
    with pytest.raises(DataError, match="less than two patients are left"):
        aggregated("patient", ROWS.assign(patient_id=["P1"] * 4 + ["P2"] * 4))


def test_evaluate_measures_lesions_beside_images(run: Run, sample_root: Path, tmp_path: Path) -> None:
    before = run.metrics
    assert call("evaluate", run.path, "--aggregate", "lesion").exit_code == 0
    metrics, dataset = run.metrics, load_dataset("sample", sample_root)
    test = dataset.table[dataset.table["image_id"].isin(run.split.query("split == 'test'")["image_id"])]
    assert metrics["aggregated"]["support"] == test["lesion_id"].nunique()
    assert metrics["aggregated"]["images"] == metrics["support"] == len(test)
    assert {name: metrics[name] for name in before} == before
    # Each lesion is of one class.
    assert metrics["aggregated"]["left_out"] == 0
    assert call("evaluate", run.path, "--aggregate", "person").exit_code == 2
    without_test = with_test_images(run, tmp_path / "without", run.split.iloc[:0])
    with pytest.raises(DataError, match="has no test split"):
        evaluate_run(without_test, aggregate="lesion")


def test_lesions_of_an_external_test_count_once_too(tiny_run: Run, other_root: Path, tmp_path: Path) -> None:
    dataset: Dataset = load_dataset("sample", other_root)
    metrics = evaluate_external(tiny_run.path, dataset, tmp_path / "out", aggregate="lesion")
    assert metrics["aggregated"]["support"] == dataset.table["lesion_id"].nunique()
