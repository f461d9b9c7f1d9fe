import tempfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data import pad_ufes_20
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.synthetic import COLUMNS, MISSING_TOGETHER, draw_lesion, lesion_mask, make_synthetic, render_lesion
from dualrefnet.errors import DataError

# What isn't True or False in the published file.
FORMATS = {
    **{"patient_id": r"PAT_\d+", "lesion_id": r"\d+", "img_id": r"PAT_\d+_\d+_\d+\.png"},
    **{"age": r"\d{1,2}", "gender": "FEMALE|MALE", "fitspatrick": r"[1-6]\.0", "diagnostic": "ACK|BCC|MEL|NEV|SCC|SEK"},
    **dict.fromkeys(("diameter_1", "diameter_2"), r"\d+\.0"),
    **dict.fromkeys(("grew", "changed"), "True|False|UNK"),
    **dict.fromkeys(("background_father", "background_mother", "region"), "[A-Z]+"),
}
SMALL = {"images": 60, "side": 64}


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("sample"), side=96)


@pytest.fixture(scope="module")
def raw(root) -> pd.DataFrame:
    return read(root / "metadata.csv")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_columns_and_values_are_written_as_in_the_published_file(raw, real_pad):
    published = read(real_pad / "metadata.csv")
    assert list(published.columns) == list(raw.columns) == COLUMNS
    for column in COLUMNS:
        pattern = FORMATS.get(column, "True|False")
        # A few published diameters have a fraction; only whole numbers are made here.
        assert (published[column].str.fullmatch(pattern) | (published[column] == "")).mean() > 0.98, column


def test_every_value_is_one_that_the_published_file_could_hold(raw):
    for column in raw.columns:
        blank = (raw[column] == "") & (column in MISSING_TOGETHER)
        assert (raw[column].str.fullmatch(FORMATS.get(column, "True|False")) | blank).all(), column
    full = raw[raw["diameter_1"] != ""]
    assert (full["diameter_2"].astype(float) <= full["diameter_1"].astype(float)).all()


def test_it_loads_as_a_synthetic_data_set_with_every_image(root):
    dataset = load_dataset("sample", root)
    assert len(dataset.with_image) == len(dataset.table) == 420
    assert dataset.warnings == []
    assert (dataset.schema.name, dataset.schema.synthetic, dataset.schema.official_rows) == ("sample", True, None)
    assert "not clinical" in dataset.schema.title
    assert "Pacheco" not in dataset.schema.citation
    assert (dataset.schema.classes, dataset.schema.fields) == (pad_ufes_20.CLASSES, pad_ufes_20.FIELDS)
    assert not pad_ufes_20.SCHEMA.synthetic
    for field in dataset.schema.fields:
        if field.kind == "categorical":
            values = set(dataset.table[field.name].dropna())
            assert values <= {*field.categories, *field.missing_codes, *field.aliases}, field.name


def test_thirteen_columns_are_missing_together_and_never_for_a_cancer(raw):
    missing = raw[list(MISSING_TOGETHER)] == ""
    assert len(MISSING_TOGETHER) == 13
    assert (missing.nunique(axis=1) == 1).all()
    missing = missing["smoke"]
    assert 0.27 < missing.mean() < 0.43
    shares = missing.groupby(raw["diagnostic"]).mean()
    assert (shares[list(pad_ufes_20.MALIGNANT)] == 0).all()
    assert shares[["ACK", "NEV", "SEK"]].between(0.3, 0.9).all()


def test_a_seed_gives_the_same_bytes_again_and_a_larger_sample_begins_with_them(tmp_path):
    first, again, other = (
        contents(make_synthetic(tmp_path / name, seed=seed, **SMALL)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    images = [{data for name, data in files.items() if name.startswith("images/")} for files in (first, other)]
    assert len(images[0]) == len(images[1]) == 60
    assert not images[0] & images[1]
    large = contents(make_synthetic(tmp_path / "large", images=90, side=64, seed=3))
    assert large["metadata.csv"].startswith(first["metadata.csv"])
    assert all(large[name] == data for name, data in first.items() if name.endswith(".png"))
    assert sum(name.startswith("images/") for name in large) == sum(name.startswith("masks/") for name in large) == 90


@settings(max_examples=5)
@given(st.integers(min_value=0, max_value=2**64))
def test_the_smallest_sample_of_any_seed_can_be_split_by_patient(seed):
    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset("sample", make_synthetic(Path(folder), seed=seed, **SMALL))
    patients = dataset.table.groupby("label")["patient_id"].nunique()
    assert patients.reindex(list(pad_ufes_20.CLASSES), fill_value=0).min() >= 3
    split = split_dataset(dataset, "grouped", folds=5, seed=0)
    assert set(split.loc[split["split"] == "train", "label"]) == set(pad_ufes_20.CLASSES)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "metadata.csv").write_text("mine")
    (tmp_path / "README.txt").write_text("my own data")
    before = contents(tmp_path)
    with pytest.raises(DataError, match="isn't a synthetic sample; give a new or empty folder"):
        make_synthetic(tmp_path, **SMALL)
    assert contents(tmp_path) == before
    with pytest.raises(DataError, match="is a file"):
        make_synthetic(tmp_path / "metadata.csv", **SMALL)


@pytest.mark.parametrize(("label", "side"), [("BCC", 100), ("MEL", 192), ("NEV", 450), ("SEK", 192)])
def test_a_mask_lies_where_the_image_changes(label, side):
    for seed in range(4):
        lesion = draw_lesion(label, np.random.default_rng([seed, 1]))
        with_lesion, without = (
            render_lesion(what, 2, 0.2, 3, np.random.default_rng([seed, 2]), side).astype(float)
            for what in (lesion, lesion._replace(pigments=lesion.pigments * 0, surface=lesion.surface * 0))
        )
        changed = np.abs(with_lesion - without).sum(axis=2)
        mask = lesion_mask(lesion, 0.2, np.random.default_rng([seed, 2]), side)
        mask = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) > 0.5
        seen = cv2.blur(changed, (3, 3)) > 0.25 * np.median(changed[mask])
        assert (seen & mask).sum() / (seen | mask).sum() > 0.75, seed
        centre = [np.mean(np.nonzero(what), axis=1) for what in (seen, mask)]
        np.testing.assert_allclose(*centre, atol=0.01 * side)
