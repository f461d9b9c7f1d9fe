"""PAD-UFES-20: smartphone images of six kinds of lesion with 21 metadata fields (Pacheco et al. 2020).

Official layout: `metadata.csv` and `images/imgs_part_{1,2,3}/*.png`. Also read: the parts beside `metadata.csv`, or one
folder `images/`; `.png` or `.jpg`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualrefnet.data.csv_table import other_columns, read_csv, shared_lesions
from dualrefnet.data.images import ImageIndex, files_in
from dualrefnet.data.schema import (
    ID_COLUMNS,
    Dataset,
    DatasetSchema,
    MetadataField,
    categorical_field,
    normalise,
    numeric_field,
    require_columns,
)
from dualrefnet.runtime.metadata import read_cell

MALIGNANT = ("BCC", "MEL", "SCC")
CLASS_NAMES = {
    "ACK": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "MEL": "melanoma",
    "NEV": "nevus",
    "SCC": "squamous cell carcinoma",
    "SEK": "seborrheic keratosis",
}
CLASSES = tuple(CLASS_NAMES)

# In the order of first appearance in the published CSV, so that the columns are those of the literature.
# fmt: off
_COUNTRIES_FATHER = (
    "POMERANIA", "GERMANY", "BRAZIL", "NETHERLANDS", "ITALY", "POLAND", "PORTUGAL", "BRASIL", "CZECH", "AUSTRIA",
    "SPAIN", "ISRAEL",
)
_COUNTRIES_MOTHER = (
    "POMERANIA", "ITALY", "GERMANY", "BRAZIL", "POLAND", "NORWAY", "PORTUGAL", "NETHERLANDS", "FRANCE", "SPAIN",
)
_REGIONS = (
    "ARM", "NECK", "FACE", "HAND", "FOREARM", "CHEST", "NOSE", "THIGH", "SCALP", "EAR", "BACK", "FOOT", "ABDOMEN",
    "LIP",
)
# fmt: on
_ORIGIN = {"missing_codes": ("UNK",), "aliases": {"BRASIL": "BRAZIL"}}
_SYMPTOM = {"tier": "M1", "missing_codes": ("UNK",)}
_MILLIMETRES = {"unit": "mm", "minimum": 0, "maximum": 500}


def _boolean(name: str, description: str, **options: Any) -> MetadataField:
    return MetadataField(name=name, kind="boolean", description=description, **options)


FIELDS = (
    _boolean("smoke", "Does the patient smoke?"),
    _boolean("drink", "Does the patient drink alcohol?"),
    categorical_field("background_father", _COUNTRIES_FATHER, "Where the father's family came from", **_ORIGIN),
    categorical_field("background_mother", _COUNTRIES_MOTHER, "Where the mother's family came from", **_ORIGIN),
    numeric_field("age", "Age of the patient", unit="years", tier="M1", minimum=0, maximum=120, subgroup=True),
    _boolean("pesticide", "Does the patient work with pesticides?"),
    categorical_field("gender", ("FEMALE", "MALE"), "Sex of the patient", subgroup=True),
    _boolean("skin_cancer_history", "Has the patient or family had skin cancer?"),
    _boolean("cancer_history", "Has the patient or family had any cancer?"),
    _boolean("has_piped_water", "Is there piped water at home?"),
    _boolean("has_sewage_system", "Is there a sewage system at home?"),
    categorical_field("fitspatrick", ("1", "2", "3", "4", "5", "6"), "Fitzpatrick skin type", subgroup=True),
    categorical_field("region", _REGIONS, "Where on the body the lesion is", tier="M1", subgroup=True),
    numeric_field("diameter_1", "Longest diameter of the lesion", **_MILLIMETRES),
    numeric_field("diameter_2", "Diameter across the longest", **_MILLIMETRES),
    _boolean("itch", "Does it itch?", **_SYMPTOM),
    _boolean("grew", "Has it grown?", **_SYMPTOM),
    _boolean("hurt", "Does it hurt?", **_SYMPTOM),
    _boolean("changed", "Has it changed?", **_SYMPTOM),
    _boolean("bleed", "Has it bled?", **_SYMPTOM),
    _boolean("elevation", "Is it raised?", **_SYMPTOM),
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
    missingness_reveals_class=True,
)


def image_folders(root: Path) -> tuple[Path, ...]:
    """Return the folders below `root` that may hold images: the official parts and `images/`."""
    parents = [root, root / "images"]
    folders = [parent / f"imgs_part_{part}" for parent in parents for part in (1, 2, 3)] + [root / "images"]
    # The official archive nests a part's files once more on some systems: imgs_part_1/imgs_part_1/*.png.
    folders += [folder / folder.name for folder in folders]
    return tuple(folder for folder in folders if folder.is_dir())


def load(root: Path, schema: DatasetSchema = SCHEMA) -> Dataset:
    raw = read_csv(root / "metadata.csv")
    require_columns(raw, ["img_id", "patient_id", "lesion_id", "diagnostic"], str(root / "metadata.csv"))
    folders = image_folders(root)
    images = ImageIndex(files_in(folders))
    # The suffix is not part of the id: the same image is .png in the release and .jpg in a re-encoded copy.
    shared = shared_lesions(raw)
    raw = raw.assign(image_id=raw["img_id"].str.replace(r"\.\w+$", "", regex=True), label=raw["diagnostic"])
    raw["image_path"] = [images.find(image_id) for image_id in raw["image_id"].fillna("")]
    # A lesion id alone is not a key: 250 of them are used by two patients.
    patient, lesion = raw["patient_id"].map(read_cell), raw["lesion_id"].map(read_cell)
    raw["lesion_id"] = (patient + "/" + lesion).fillna(lesion)
    table, notes = normalise(raw, schema)
    others = other_columns(raw, ("img_id", "diagnostic", *ID_COLUMNS, *(field.name for field in schema.fields)))
    return Dataset(table, schema, root, notes, other_columns=others, image_folders=folders, shared_lesions=shared)
