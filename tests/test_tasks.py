"""Which classes a run is about, and the splits that a user gives: recipe keys `data.keep`, `data.classes`, protocol `own`."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.loader import read_dataset, recipe_split
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.display.format import metrics_tables
from dualrefnet.errors import DataError, DualRefNetError, RecipeError, SplitError
from dualrefnet.recipe import Recipe, load_recipe
from dualrefnet.report.provenance import provenance_section, run_notes
from dualrefnet.run import Run
from dualrefnet.training.preflight import check_recipe
from dualrefnet.training.train import train_recipe

TRIAGE = {"malignant": ["BCC", "MEL", "SCC"], "benign": ["ACK", "NEV", "SEK"]}


@pytest.fixture(scope="module")
def sample(sample_root: Path) -> Dataset:
    return load_dataset("sample", sample_root)


@pytest.fixture
def quick(tiny_recipe: Recipe) -> Callable[..., Recipe]:
    """Return the recipe of a training of a second, with changes."""
    return lambda **data: load_recipe(
        tiny_recipe, {"model.method": "metadata_only", "data.rows": "all", **{f"data.{key}": data[key] for key in data}}
    )


def test_classes_that_are_kept_take_their_rows_and_nothing_else_changes(sample: Dataset) -> None:
    kept = sample.keep_classes(["NEV", "MEL"])
    rows = sample.table[sample.table["label"].isin(["MEL", "NEV"])]
    assert list(kept.table["image_id"]) == list(rows["image_id"])
    assert (kept.schema.classes, kept.schema.malignant) == (("MEL", "NEV"), ("MEL",))
    assert list(kept.other_columns["biopsed"]) == list(sample.other_columns["biopsed"][rows.index])


def test_a_group_of_classes_is_malignant_if_all_of_them_are(sample: Dataset) -> None:
    grouped = sample.group_classes(TRIAGE)
    assert (grouped.schema.classes, grouped.schema.malignant) == (("malignant", "benign"), ("malignant",))
    assert list(grouped.table["label"] == "malignant") == list(sample.table["label"].isin(TRIAGE["malignant"]))
    assert "melanoma" in grouped.schema.class_names["malignant"]
    mixed = sample.group_classes({"pigmented": ["MEL", "NEV"], "other": ["ACK", "SEK"], "cancer": ["BCC", "SCC"]})
    assert mixed.schema.malignant == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"keep": ["MEL", "NVE"]}, "data.keep names NVE, which is no class .* did you mean 'NEV'"),
        ({"keep": ["MEL"]}, "leaves MEL alone"),
        ({"classes": {"bad": ["MEL", "BCC", "SCC"], "good": ["ACK", "NEV"]}}, "has no group for SEK"),
        ({"classes": {**TRIAGE, "pigmented": ["MEL"]}}, "has MEL in two groups"),
        ({"classes": {"all": ["ACK", "NEV", "SEK", "BCC", "MEL", "SCC"]}}, "at least two groups"),
        ({"classes": {**TRIAGE, "none": []}}, "none of them empty"),
        ({"keep": ["MEL", "NEV"], "classes": TRIAGE}, "data.classes names BCC, which is no class"),
        ({"keep": ["MEL", "NEV"], "protocol": "paper"}, "need another data.protocol"),
        ({"classes": TRIAGE, "protocol": "paper"}, "need another data.protocol"),
        ({"keep": [True, "no"]}, "needs quotes"),
        ({"keep": "MEL"}, "data.keep"),
    ],
)
def test_a_task_that_does_not_fit_the_classes_is_refused(quick: Callable[..., Recipe], data: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        read_dataset(quick(**data))
    assert "\n" not in str(refused.value)


def test_all_measures_follow_the_task(quick: Callable[..., Recipe], tmp_path: Path) -> None:
    run = train_recipe(quick(classes=TRIAGE), tmp_path / "run")
    metrics = run.metrics
    assert list(metrics["per_class"]) == ["malignant", "benign"]
    # Of two classes one is the cancers: both ways of measuring are one.
    for key in ("sensitivity", "specificity", "auc"):
        assert metrics["malignant"][key] == pytest.approx(metrics["per_class"]["malignant"][key])
    assert run.model["classes"] == ["malignant", "benign"]
    assert set(run.split["label"]) == {"malignant", "benign"}
    assert Run(run.path).recipe.data.classes == {name: tuple(members) for name, members in TRIAGE.items()}


# Splits of one's own.


def write_split(folder: Path, dataset: Dataset, change: Callable[[pd.DataFrame], pd.DataFrame] | None = None) -> Path:
    split = split_dataset(dataset, "grouped-cv", 2, 5, 7)[["image_id", "split"]]
    (change(split) if change else split).to_csv(folder / "split.csv", index=False)
    return folder / "split.csv"


def names_as_people_write_them(split: pd.DataFrame) -> pd.DataFrame:
    return split.assign(image_id=split["image_id"].str.lower() + ".PNG", split=split["split"].str.title())


@pytest.mark.parametrize(
    "change", [None, names_as_people_write_them, lambda split: split.sample(frac=1, random_state=0)]
)
def test_an_own_split_is_that_of_the_file(
    sample: Dataset, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame] | None
) -> None:
    file = write_split(tmp_path, sample, change)
    expected = split_dataset(sample, "grouped-cv", 2, 5, 7)
    pd.testing.assert_frame_equal(split_dataset(sample, "own", split_file=file), expected)


def test_rows_that_the_file_does_not_name_are_left_out_aloud(
    sample: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Some aren't there, some have an empty cell.
    file = write_split(
        tmp_path, sample, lambda split: split.iloc[10:].assign(split=split["split"].mask(split.index > 99))
    )
    split = split_dataset(sample, "own", split_file=file)
    assert list(split["image_id"]) == list(sample.table["image_id"][10:100])
    assert f"30 of {len(sample.table)} rows are in no split" in capsys.readouterr().err


def a_patient_crosses(split: pd.DataFrame) -> pd.DataFrame:
    patient = split["image_id"].str.extract(r"(PAT_\d+)_")[0]
    first = split.index[patient.duplicated(keep=False) & (split["split"] == "train")][0]
    return split.assign(split=split["split"].mask(split.index == first, "test"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda split: split.replace({"val": "validation"}), "'validation', and a split is train, val or test"),
        (lambda split: pd.concat([split, split.iloc[:2]]), "2 images of .*split.csv stand there twice"),
        (lambda split: split.replace({split["image_id"][0]: "PAT_0"}), "1 images of .* are not in .*first: PAT_0"),
        (lambda split: split.rename(columns={"split": "set"}), "has no column split; it has: image_id, set"),
        (lambda split: split.replace({"val": "train"}), "no row is in val"),
        (a_patient_crosses, r"1 groups .* the first: PAT_\d+; .* data.allow_leak=true"),
    ],
)
def test_a_wrong_own_split_is_refused(
    sample: Dataset, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], words: str
) -> None:
    with pytest.raises(DualRefNetError, match=words) as refused:
        split_dataset(sample, "own", split_file=write_split(tmp_path, sample, change))
    assert "\n" not in str(refused.value)


def test_an_own_split_without_its_source_or_its_protocol_is_refused(sample: Dataset, tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"give data\.split_file=CSV"):
        split_dataset(sample, "own")
    with pytest.raises(DataError, match=r"there is no file .*nowhere.csv"):
        split_dataset(sample, "own", split_file=tmp_path / "nowhere.csv")
    for key, value in (("split_file", "a.csv"), ("allow_leak", True)):
        with pytest.raises(RecipeError, match=r"are for data\.protocol own"):
            load_recipe("sample", {f"data.{key}": value})


def test_a_column_of_a_table_is_a_split_too(tmp_path: Path) -> None:
    table = pd.DataFrame({"image": [f"{row}.png" for row in range(8)], "label": list("ABABABAB")})
    table["person"], table["part"] = list("ppqqrrss"), ["train", "train", "val", "val", "test", "test", "", None]
    table.to_csv(tmp_path / "table.csv", index=False)
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump({"patient": "person", "split": "part"}))
    split = split_dataset(load_dataset("csv_table", tmp_path), "own")
    assert list(split["split"]) == ["train", "train", "val", "val", "test", "test"]
    (tmp_path / "dataset.yaml").write_text(
        yaml.safe_dump({"split": "part", "metadata": [{"name": "part", "kind": "categorical"}]})
    )
    with pytest.raises(DataError, match="part can't be a metadata field"):
        load_dataset("csv_table", tmp_path)


def test_a_leak_that_is_allowed_is_told_by_every_output(
    quick: Callable[..., Recipe], sample: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"protocol": "own", "split_file": str(write_split(tmp_path, sample, a_patient_crosses))}
    with pytest.raises(SplitError, match="1 groups"):
        train_recipe(quick(**data), tmp_path / "refused")
    with pytest.raises(SplitError, match="1 groups"):
        check_recipe(quick(**data))
    run = train_recipe(quick(**data, allow_leak=True), tmp_path / "run")
    said = "1 patients are in more than one split"
    printed = "\n".join(note for table in metrics_tables(run.metrics) for note in table.notes)
    provenance = " ".join(cell.text for row in provenance_section(run).items[0].rows for cell in row)
    for text in (
        capsys.readouterr().err,
        " ".join(run.metrics["remarks"]),
        printed,
        " ".join(run_notes(run)),
        provenance,
    ):
        assert said in text
    assert run.split.equals(recipe_split(run.recipe, sample, None).astype(str))
