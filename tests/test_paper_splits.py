"""Against the published CSVs; the numbers of Table 1 are the paper's own."""

import pytest

from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import leakage, split_counts, split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.errors import SplitError

TABLE_1_PAD = {
    "BCC": (563, 141, 141),
    "SEK": (157, 39, 39),
    "ACK": (486, 122, 122),
    "SCC": (128, 32, 32),
    "NEV": (163, 41, 40),
    "MEL": (35, 8, 9),
    "total": (1532, 383, 383),
}
TABLE_1_ISIC = {
    "BCC": (2337, 262, 646),
    "AK": (591, 72, 182),
    "SCC": (458, 43, 121),
    "NV": (7642, 871, 2119),
    "MEL": (3171, 343, 832),
    "BKL": (1667, 177, 489),
    "DF": (168, 20, 47),
    "VASC": (151, 11, 60),
    "total": (16185, 1799, 4496),
}
PAD_CLASSES = {"BCC": 845, "ACK": 730, "NEV": 244, "SEK": 235, "SCC": 192, "MEL": 52}
ISIC_CLASSES = {"NV": 12875, "MEL": 4522, "BCC": 3323, "BKL": 2624, "AK": 867, "SCC": 628, "VASC": 253, "DF": 239}
THIRTEEN = [
    *("smoke", "drink", "pesticide", "gender", "skin_cancer_history", "cancer_history", "has_piped_water"),
    *("has_sewage_system", "fitspatrick", "diameter_1", "diameter_2"),
]


@pytest.fixture(scope="module")
def pad(real_pad):
    return load_dataset("pad_ufes_20", real_pad)


@pytest.fixture(scope="module")
def isic(real_isic):
    return load_dataset("isic_2019", real_isic)


def cells(dataset):
    counts = split_counts(split_dataset(dataset, "paper"), dataset.schema.classes)
    return {
        label: tuple(row)
        for label, row in zip(counts.index, counts[["train", "val", "test"]].to_numpy().tolist(), strict=True)
    }


def test_table_1_of_pad_ufes_20_to_the_row(pad):
    assert cells(pad) == TABLE_1_PAD


def test_table_1_of_isic_2019_to_the_row(isic):
    assert cells(isic) == TABLE_1_ISIC


def test_the_data_sets_have_the_published_sizes(pad, isic):
    assert pad.table["label"].value_counts().to_dict() == PAD_CLASSES
    assert pad.table["patient_id"].nunique() == 1373
    assert pad.table["lesion_id"].nunique() == 1891
    assert isic.table["label"].value_counts().to_dict() == ISIC_CLASSES
    assert pad.remarks == isic.remarks == []


def test_half_of_the_papers_pad_test_images_show_a_patient_of_training(pad):
    shares = leakage(pad, split_dataset(pad, "paper"))
    assert shares["patient"]["train"] == pytest.approx(0.493, abs=5e-4)
    assert shares["patient"]["train_or_val"] == pytest.approx(0.554, abs=5e-4)
    assert shares["lesion"]["train"] == pytest.approx(0.227, abs=5e-4)
    assert shares["lesion"]["train_or_val"] == pytest.approx(0.292, abs=5e-4)
    per_class = {
        name: {label: round(100 * share) for label, share in shares[name]["per_class"].items()} for name in shares
    }
    assert per_class == {
        "patient": {"ACK": 41, "BCC": 56, "MEL": 78, "NEV": 42, "SCC": 56, "SEK": 46},
        "lesion": {"ACK": 18, "BCC": 25, "MEL": 56, "NEV": 15, "SCC": 28, "SEK": 26},
    }


def test_two_thirds_of_the_papers_isic_test_images_show_a_lesion_of_training(isic):
    shares = leakage(isic, split_dataset(isic, "paper"))
    assert shares["patient"] is None
    assert shares["lesion"]["train"] == pytest.approx(0.637, abs=5e-4)
    assert shares["lesion"]["train_or_val"] == pytest.approx(0.661, abs=5e-4)
    expected = {
        "AK": 0.857,
        "MEL": 0.804,
        "BCC": 0.779,
        "SCC": 0.727,
        "DF": 0.723,
        "BKL": 0.669,
        "VASC": 0.667,
        "NV": 0.495,
    }
    assert shares["lesion"]["per_class"] == pytest.approx(expected, abs=5e-4)


def test_the_papers_isic_rows_are_those_without_a_gap(isic):
    kept = split_dataset(isic, "paper")
    assert len(isic.table) - len(kept) == 2851
    rows = isic.table.set_index("image_id").loc[kept["image_id"], ["age_approx", "anatom_site_general", "sex"]]
    assert not rows.isna().any().any()


def test_what_is_missing_of_isic(isic):
    gaps = isic.table[["age_approx", "anatom_site_general", "sex", "lesion_id"]].isna().sum()
    assert gaps.to_dict() == {"age_approx": 437, "anatom_site_general": 2631, "sex": 384, "lesion_id": 2084}
    assert (isic.table["age_approx"] == 0).sum() == 54


def test_thirteen_columns_of_pad_are_missing_together_and_never_for_a_cancer(pad):
    missing = pad.table[THIRTEEN].isna()
    assert (missing.nunique(axis=1) == 1).all()
    gap = missing.any(axis=1)
    assert gap.sum() == 804
    assert pad.table.loc[gap, ["background_father", "background_mother"]].isna().all().all()
    assert set(pad.table["label"][gap]) == {"ACK", "NEV", "SEK"}
    shares = {label: round(100 * share, 1) for label, share in gap.groupby(pad.table["label"]).mean().items() if share}
    assert shares == {"ACK": 61.2, "NEV": 69.3, "SEK": 80.0}
    assert pad.table["label"][~gap].isin(pad.schema.malignant).mean() == pytest.approx(0.729, abs=5e-4)


def test_what_is_always_recorded_in_pad_is_tier_m1(pad):
    fields = [field for field in pad.schema.fields if field.tier == "M1"]
    assert not pad.table[[field.name for field in fields]].isna().any().any()
    unknown = {field.name: int((pad.table[field.name] == "UNK").sum()) for field in fields if field.kind == "boolean"}
    assert (unknown["grew"], unknown["changed"]) == (402, 396)
    assert max(count for name, count in unknown.items() if name not in ("grew", "changed")) <= 10


def test_complete_rows_of_pad(pad):
    assert pad.table[[field.name for field in pad.schema.fields]].notna().all(axis=1).sum() == 1474


def test_every_category_of_pad_and_isic_is_in_the_schema(pad, isic):
    for dataset in (pad, isic):
        for field in dataset.schema.fields:
            if field.kind != "numeric":
                legal = (
                    {*field.categories, *field.missing_codes}
                    if field.categories
                    else {"True", "False", *field.missing_codes}
                )
                assert set(dataset.table[field.name].dropna()) <= legal, field.name


def test_the_papers_split_is_refused_for_a_table_in_another_order(pad):
    table = pad.table.sort_values("image_id").reset_index(drop=True)
    with pytest.raises(SplitError, match="published order"):
        split_dataset(Dataset(table, pad.schema, pad.root), "paper")


def test_the_default_protocol_parts_the_patients(pad):
    split = split_dataset(pad)
    assert len(split) == 2298
    shares = leakage(pad, split)
    assert shares["patient"]["train_or_val"] == shares["lesion"]["train_or_val"] == 0
    counts = split_counts(split, pad.schema.classes)
    assert (counts.loc["MEL"] >= 5).all()
