"""PAD-UFES-20: smartphone photographs of six kinds of lesion with 21 metadata fields (Pacheco et al. 2020).

Official layout: `metadata.csv` and `images/imgs_part_{1,2,3}/*.png`. Also read: the parts beside `metadata.csv`, or
one folder `images/`; `.png` or `.jpg`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dualrefnet.data.adapters import Dataset, index_images, other_columns, read_csv
from dualrefnet.data.schema import ID_COLUMNS, DatasetSchema, MetadataField, normalise
from dualrefnet.errors import DataError

CLASSES = ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK")
MALIGNANT = ("BCC", "MEL", "SCC")
CLASS_NAMES = {
    "ACK": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "MEL": "melanoma",
    "NEV": "nevus",
    "SCC": "squamous cell carcinoma",
    "SEK": "seborrheic keratosis",
}

# In the order of first appearance in the published CSV, so that the columns are those of the literature.
_COUNTRIES_FATHER = [
    "POMERANIA",
    "GERMANY",
    "BRAZIL",
    "NETHERLANDS",
    "ITALY",
    "POLAND",
    "PORTUGAL",
    "BRASIL",
    "CZECH",
    "AUSTRIA",
    "SPAIN",
    "ISRAEL",
]
_COUNTRIES_MOTHER = [
    "POMERANIA",
    "ITALY",
    "GERMANY",
    "BRAZIL",
    "POLAND",
    "NORWAY",
    "PORTUGAL",
    "NETHERLANDS",
    "FRANCE",
    "SPAIN",
]
_REGIONS = [
    "ARM",
    "NECK",
    "FACE",
    "HAND",
    "FOREARM",
    "CHEST",
    "NOSE",
    "THIGH",
    "SCALP",
    "EAR",
    "BACK",
    "FOOT",
    "ABDOMEN",
    "LIP",
]


def _boolean(name: str, description: str) -> MetadataField:
    return MetadataField(name=name, kind="boolean", description=description)


def _symptom(name: str, description: str) -> MetadataField:
    return MetadataField(name=name, kind="boolean", tier="M1", missing_codes=("UNK",), description=description)


def _origin(name: str, countries: list[str], whose: str) -> MetadataField:
    return MetadataField(
        name=name,
        kind="categorical",
        categories=tuple(countries),
        missing_codes=("UNK",),
        aliases={"BRASIL": "BRAZIL"},
        description=f"Where {whose}'s family came from",
    )


FIELDS = (
    _boolean("smoke", "Does the patient smoke?"),
    _boolean("drink", "Does the patient drink alcohol?"),
    _origin("background_father", _COUNTRIES_FATHER, "the father"),
    _origin("background_mother", _COUNTRIES_MOTHER, "the mother"),
    MetadataField(
        name="age",
        kind="numeric",
        unit="years",
        tier="M1",
        minimum=0,
        maximum=120,
        description="Age of the patient",
        subgroup=True,
    ),
    _boolean("pesticide", "Does the patient work with pesticides?"),
    MetadataField(
        name="gender",
        kind="categorical",
        categories=("FEMALE", "MALE"),
        description="Sex of the patient",
        subgroup=True,
    ),
    _boolean("skin_cancer_history", "Has the patient or family had skin cancer?"),
    _boolean("cancer_history", "Has the patient or family had any cancer?"),
    _boolean("has_piped_water", "Is there piped water at home?"),
    _boolean("has_sewage_system", "Is there a sewage system at home?"),
    MetadataField(
        name="fitspatrick",
        kind="categorical",
        categories=("1", "2", "3", "4", "5", "6"),
        description="Fitzpatrick skin type",
        subgroup=True,
    ),
    MetadataField(
        name="region",
        kind="categorical",
        tier="M1",
        categories=tuple(_REGIONS),
        description="Where on the body the lesion is",
        subgroup=True,
    ),
    MetadataField(
        name="diameter_1",
        kind="numeric",
        unit="mm",
        minimum=0,
        maximum=500,
        description="Longest diameter of the lesion",
    ),
    MetadataField(
        name="diameter_2", kind="numeric", unit="mm", minimum=0, maximum=500, description="Diameter across the longest"
    ),
    _symptom("itch", "Does it itch?"),
    _symptom("grew", "Has it grown?"),
    _symptom("hurt", "Does it hurt?"),
    _symptom("changed", "Has it changed?"),
    _symptom("bleed", "Has it bled?"),
    _symptom("elevation", "Is it raised?"),
)

SCHEMA = DatasetSchema(
    name="pad_ufes_20",
    title="PAD-UFES-20",
    classes=CLASSES,
    malignant=MALIGNANT,
    class_names=CLASS_NAMES,
    fields=FIELDS,
    licence="CC BY 4.0",
    citation="Pacheco et al., PAD-UFES-20, Data in Brief 32 (2020) 106221; doi:10.17632/zr7vgbcyr2.1",
    official_rows=2298,
)


def image_folders(root: Path) -> list[Path]:
    """Return the folders below `root` that may hold images: the official parts and `images/`."""
    parents = [root, root / "images"]
    folders = [parent / f"imgs_part_{part}" for parent in parents for part in (1, 2, 3)] + [root / "images"]
    # The official archive nests a part's files once more on some systems: imgs_part_1/imgs_part_1/*.png.
    folders += [folder / folder.name for folder in folders]
    return [folder for folder in folders if folder.is_dir()]


def read_raw(root: Path) -> pd.DataFrame:
    """Read `metadata.csv` as text, with the id columns of a lesion table added.

    Raises:
        DataError: the file is missing, empty or has other columns.
    """
    raw = read_csv(root / "metadata.csv", dtype=str, keep_default_na=False, na_values=[""])
    absent = [column for column in ("img_id", "patient_id", "lesion_id", "diagnostic") if column not in raw.columns]
    if absent:
        raise DataError(
            f"{root / 'metadata.csv'} has no column {', '.join(absent)}: it isn't the metadata of PAD-UFES-20"
        )
    # The suffix is not part of the id: the same image is .png in the release and .jpg in a re-encoded copy.
    return raw.assign(image_id=raw["img_id"].str.replace(r"\.\w+$", "", regex=True), label=raw["diagnostic"])


def load(root: Path, schema: DatasetSchema = SCHEMA) -> Dataset:
    """Read PAD-UFES-20, or a data set in its layout (`schema`).

    Raises:
        DataError: see `read_raw` and `dualrefnet.data.schema.normalise`.
    """
    raw = read_raw(root)
    paths = index_images(image_folders(root))
    raw["image_path"] = [str(paths[stem]) if stem in paths else None for stem in raw["image_id"].fillna("")]
    # A lesion id alone is not a key: 250 of them are used by two patients.
    raw["lesion_id"] = raw["patient_id"] + "/" + raw["lesion_id"]
    table, remarks = normalise(raw, schema)
    known = ("img_id", "diagnostic", *ID_COLUMNS, *(field.name for field in schema.fields))
    return Dataset(table, schema, root, remarks, other_columns(raw, known))
