"""ISIC-2019: dermoscopic photographs of eight kinds of lesion with age, sex and body site.

Official layout: `ISIC_2019_Training_GroundTruth.csv`, `ISIC_2019_Training_Metadata.csv` and one folder of images,
`ISIC_2019_Training_Input/` (or `images/`); some ids end in `_downsampled`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dualrefnet.data.adapters import Dataset, index_images, other_columns, read_csv
from dualrefnet.data.schema import ID_COLUMNS, DatasetSchema, MetadataField, normalise
from dualrefnet.errors import DataError

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
CLASS_NAMES = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AK": "actinic keratosis",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
    "SCC": "squamous cell carcinoma",
}
GROUND_TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"

SCHEMA = DatasetSchema(
    name="isic_2019",
    title="ISIC-2019",
    classes=CLASSES,
    malignant=("MEL", "BCC", "SCC"),
    class_names=CLASS_NAMES,
    # None of the three is recorded for every image, so all are tier M2.
    fields=(
        MetadataField(
            name="age_approx",
            kind="numeric",
            unit="years",
            minimum=0,
            maximum=120,
            description="Age of the patient, to 5 years",
            subgroup=True,
        ),
        MetadataField(
            name="sex",
            kind="categorical",
            categories=("female", "male"),
            description="Sex of the patient",
            subgroup=True,
        ),
        MetadataField(
            name="anatom_site_general",
            kind="categorical",
            description="Where on the body the lesion is",
            subgroup=True,
            categories=(
                "anterior torso",
                "head/neck",
                "lateral torso",
                "lower extremity",
                "oral/genital",
                "palms/soles",
                "posterior torso",
                "upper extremity",
            ),
        ),
    ),
    # The release names no patients; a lesion photographed several times is the closest thing.
    group_by="lesion_id",
    licence="CC BY-NC 4.0",
    citation="Tschandl et al. 2018 (HAM10000); Codella et al. 2018 (MSK); Combalia et al. 2019 (BCN_20000)",
    official_rows=25331,
)


def image_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that may hold images."""
    names = ("ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input", "images")
    return [root / name for name in names if (root / name).is_dir()]


def read_raw(root: Path) -> pd.DataFrame:
    """Join the two CSVs, with the id columns of a lesion table added, in the order of the ground truth.

    Raises:
        DataError: a file is missing or has other columns, an image has no or several labels, or the two files name
            different images.
    """
    truth = read_csv(root / GROUND_TRUTH)
    metadata = read_csv(root / METADATA, dtype=str, keep_default_na=False, na_values=[""])
    for name, table, columns in (
        (GROUND_TRUTH, truth, ("image", *CLASSES)),
        (METADATA, metadata, ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")),
    ):
        absent = [column for column in columns if column not in table.columns]
        if absent:
            raise DataError(f"{root / name} has no column {', '.join(absent)}: it isn't a file of ISIC-2019")
    # Text among the scores becomes NaN, which is no label.
    scores = truth[list(CLASSES)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    wrong = (scores.sum(axis=1) != 1) | (scores.max(axis=1) != 1)
    if wrong.any():
        raise DataError(
            f"{int(wrong.sum())} rows of {GROUND_TRUTH} don't have exactly one label, the first: {truth['image'][wrong].iloc[0]}"
        )
    if set(truth["image"]) != set(metadata["image"]):
        raise DataError(f"{GROUND_TRUTH} and {METADATA} don't name the same images; download both again")
    truth = truth.assign(label=[CLASSES[index] for index in scores.argmax(axis=1)])
    return truth[["image", "label"]].merge(metadata, on="image", how="left").rename(columns={"image": "image_id"})


def load(root: Path) -> Dataset:
    """Read ISIC-2019.

    Raises:
        DataError: see `read_raw` and `dualrefnet.data.schema.normalise`.
    """
    raw = read_raw(root)
    paths = index_images(image_folders(root))
    raw["image_path"] = [str(paths[stem]) if stem in paths else None for stem in raw["image_id"]]
    raw["patient_id"] = None
    table, remarks = normalise(raw, SCHEMA)
    return Dataset(
        table, SCHEMA, root, remarks, other_columns(raw, (*ID_COLUMNS, *(field.name for field in SCHEMA.fields)))
    )
