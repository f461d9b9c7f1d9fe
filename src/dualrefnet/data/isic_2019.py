"""ISIC-2019: dermoscopic images of eight kinds of lesion with age, sex and body site.

Official layout: `ISIC_2019_Training_GroundTruth.csv`, `ISIC_2019_Training_Metadata.csv` and one folder of images,
`ISIC_2019_Training_Input/` (or `images/`); some ids end in `_downsampled`.
"""

from __future__ import annotations

from pathlib import Path

from dualrefnet.data.csv_table import other_columns, read_csv, read_one_hot
from dualrefnet.data.images import ImageIndex, files_in
from dualrefnet.data.schema import (
    ID_COLUMNS,
    Dataset,
    DatasetSchema,
    categorical_field,
    normalise,
    numeric_field,
    require_columns,
)
from dualrefnet.errors import DataError

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
CLASSES = tuple(CLASS_NAMES)
GROUND_TRUTH = "ISIC_2019_Training_GroundTruth.csv"
METADATA = "ISIC_2019_Training_Metadata.csv"

# fmt: off
_SITES = (
    "anterior torso", "head/neck", "lateral torso", "lower extremity", "oral/genital", "palms/soles",
    "posterior torso", "upper extremity",
)
# fmt: on
SCHEMA = DatasetSchema(
    name="isic_2019",
    title="ISIC-2019",
    classes=CLASSES,
    malignant=("MEL", "BCC", "SCC"),
    class_names=CLASS_NAMES,
    # None of the three is recorded for every image, so all are tier M2.
    fields=(
        numeric_field(
            "age_approx", "Age of the patient, to 5 years", unit="years", minimum=0, maximum=120, subgroup=True
        ),
        categorical_field("sex", ("female", "male"), "Sex of the patient", subgroup=True),
        categorical_field("anatom_site_general", _SITES, "Where on the body the lesion is", subgroup=True),
    ),
    # The release has no patient ids; a lesion with several images is the closest thing.
    group_by="lesion_id",
    licence="CC BY-NC 4.0",
    citation="Tschandl et al. 2018 (HAM10000); Codella et al. 2018 (MSK); Combalia et al. 2019 (BCN_20000)",
    official_rows=25331,
)


def image_folders(root: Path) -> tuple[Path, ...]:
    names = ("ISIC_2019_Training_Input", "ISIC_2019_Training_Input/ISIC_2019_Training_Input", "images")
    return tuple(root / name for name in names if (root / name).is_dir())


def load(root: Path) -> Dataset:
    truth = read_csv(root / GROUND_TRUTH)
    metadata = read_csv(root / METADATA)
    require_columns(truth, ["image", *CLASSES], str(root / GROUND_TRUTH))
    require_columns(metadata, ["image", "age_approx", "anatom_site_general", "lesion_id", "sex"], str(root / METADATA))
    truth = truth.assign(label=read_one_hot(truth, CLASSES, "image", GROUND_TRUTH))
    if set(truth["image"]) != set(metadata["image"]):
        raise DataError(f"{GROUND_TRUTH} and {METADATA} don't name the same images; download both again")
    raw = truth[["image", "label"]].merge(metadata, on="image", how="left").rename(columns={"image": "image_id"})
    folders = image_folders(root)
    images = ImageIndex(files_in(folders))
    raw["image_path"] = [images.find(image_id) for image_id in raw["image_id"]]
    raw["patient_id"] = None
    table, notes = normalise(raw, SCHEMA)
    others = other_columns(raw, (*ID_COLUMNS, *(field.name for field in SCHEMA.fields)))
    return Dataset(table, SCHEMA, root, notes, other_columns=others, image_folders=folders)
