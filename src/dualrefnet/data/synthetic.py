"""The synthetic data set (`dualrefnet sample`): images and patients made by a program, in the layout of PAD-UFES-20.

It lets everything be tried and tested without a download. As in PAD-UFES-20, neither the image nor the metadata alone
determines the class, and it has that data set's shortcuts too: 13 columns are missing together, and never for a cancer;
every cancer was biopsied. Beside the images lie masks, the true outlines of the lesions: for checking where a model
looks, never for training.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dualrefnet.data import pad_ufes_20
from dualrefnet.data.schema import Dataset
from dualrefnet.data.store import map_ahead
from dualrefnet.data.synthetic_lesions import draw_lesion, lesion_mask, render_lesion
from dualrefnet.errors import DataError
from dualrefnet.files import atomic_path, write_csv, write_text

MINIMUM_IMAGES = 60
MINIMUM_SIDE = 64
README = "README.txt"

SCHEMA = pad_ufes_20.SCHEMA.model_copy(
    update={
        "name": "sample",
        "title": "Synthetic sample (made by a program, not clinical)",
        "licence": "Apache-2.0",
        "citation": "Synthetic sample of dualrefnet: images and patients made by a program, for testing software only",
        "official_rows": None,
        "synthetic": True,
    }
)

# fmt: off
MISSING_TOGETHER = (
    "smoke", "drink", "background_father", "background_mother", "pesticide", "gender", "skin_cancer_history",
    "cancer_history", "has_piped_water", "has_sewage_system", "fitspatrick", "diameter_1", "diameter_2",
)
# fmt: on
SYMPTOMS = ("itch", "grew", "hurt", "changed", "bleed", "elevation")
# The published order: the metadata fields as in the schema, with the ids and the diagnosis among them.
_FIELDS = [field.name for field in SCHEMA.fields]
COLUMNS = ["patient_id", "lesion_id", *_FIELDS[:-6], "diagnostic", *_FIELDS[-6:], "img_id", "biopsed"]

# Both are the first words of a README: that of today, and that of data sets made by earlier releases.
_MARKS = ("SYNTHETIC SAMPLE, NOT CLINICAL", "DRAWN SAMPLE, NOT CLINICAL")
_FOLDERS = ("images", "masks")
_IMAGE_NAME = re.compile(r"PAT_\d+_\d+_\d+\.png")
# Every image has the random stream [seed, number]; these third numbers keep the other streams apart from it.
_PATIENT, _LESION, _DEAL = 1, 2, 3


class _Profile(NamedTuple):
    """What the patients and lesions of one class tend to be like."""

    age: tuple[float, float]  # mean and standard deviation, years
    diameter: float  # median, mm
    symptoms: tuple[float, ...]  # probability of each of `SYMPTOMS`
    unknown: float  # probability that growth and change are `UNK`
    missing: float  # probability that `MISSING_TOGETHER` is missing
    others: tuple[str, ...]  # classes of a patient's further lesions that aren't of this class
    regions: dict[str, float]  # weight of each region; every other region has 1


class _Image(NamedTuple):
    """One image to render: its row of `metadata.csv`, and what is true of it even where the row is missing values."""

    row: dict[str, str | None]
    number: int
    lesion: int
    label: str
    skin_type: int
    diameter: int


# After PAD-UFES-20. MEL and SEK have much the same metadata and differ in the image; ACK and SCC, NEV and SEK the other
# way round. fmt: off
_PROFILES = {
    "ACK": _Profile(
        (62, 12),
        10,
        (0.75, 0.20, 0.08, 0.06, 0.10, 0.25),
        0.03,
        0.56,
        ("BCC", "SCC", "SEK"),
        {"FOREARM": 22, "FACE": 14, "HAND": 9, "ARM": 9, "NOSE": 3},
    ),
    "BCC": _Profile(
        (64, 12),
        11,
        (0.68, 0.55, 0.35, 0.15, 0.52, 0.82),
        0.28,
        0.00,
        ("ACK", "SCC"),
        {"FACE": 20, "NOSE": 12, "CHEST": 10, "BACK": 8, "NECK": 5, "EAR": 3},
    ),
    "MEL": _Profile(
        (59, 14),
        14,
        (0.22, 0.68, 0.05, 0.55, 0.10, 0.35),
        0.18,
        0.00,
        ("NEV", "SEK"),
        {"BACK": 16, "ARM": 8, "THIGH": 8, "CHEST": 7, "FACE": 7, "FOREARM": 5},
    ),
    "NEV": _Profile(
        (38, 15),
        9,
        (0.12, 0.45, 0.03, 0.12, 0.03, 0.55),
        0.12,
        0.62,
        ("SEK",),
        {"BACK": 18, "FACE": 10, "CHEST": 8, "ABDOMEN": 5, "THIGH": 5},
    ),
    "SCC": _Profile(
        (69, 11),
        13,
        (0.70, 0.60, 0.35, 0.20, 0.40, 0.80),
        0.34,
        0.00,
        ("ACK", "BCC"),
        {"FACE": 9, "FOREARM": 9, "HAND": 9, "ARM": 7, "EAR": 6, "BACK": 5, "LIP": 4},
    ),
    "SEK": _Profile(
        (64, 12),
        10,
        (0.28, 0.48, 0.03, 0.08, 0.05, 0.72),
        0.04,
        0.66,
        ("ACK", "NEV"),
        {"FACE": 20, "BACK": 12, "CHEST": 9, "ARM": 5},
    ),
}
# The patients' classes are dealt from a shuffled deck, so that no seed makes a class rare. The first rounds deal one
# card a class: the smallest sample, too, has several patients of every class.
_EVEN_ROUNDS = 4
_DECK = (*("ACK", "BCC") * 5, *("NEV", "SEK") * 3, *("MEL", "SCC") * 2)
_ORIGINS = {
    "POMERANIA": 0.30,
    "GERMANY": 0.28,
    "ITALY": 0.13,
    "BRAZIL": 0.12,
    "BRASIL": 0.02,
    "PORTUGAL": 0.03,
    "UNK": 0.12,
}
_HAIRS = {
    "SCALP": 14.0,
    "FOREARM": 6.0,
    "ARM": 4.0,
    "THIGH": 5.0,
    "CHEST": 5.0,
    "BACK": 2.5,
    "ABDOMEN": 3.0,
    "HAND": 2.0,
}
# fmt: on


def load(root: Path) -> Dataset:
    """Read a synthetic sample; see `dualrefnet.data.pad_ufes_20.load`."""
    return pad_ufes_20.load(root, SCHEMA)


def make_synthetic(
    root: Path, images: int = 420, seed: int = 0, side: int = 192, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Make the synthetic sample in a folder; a sample that is already there is replaced.

    One seed gives the same bytes with the same versions of NumPy, OpenCV and Pillow, and the images of a smaller sample
    are the first images of a larger one.

    Args:
        root: new or empty folder, or that of a synthetic sample.
        images: number of images.
        seed: of everything random; not negative.
        side: side of an image in pixels.
        progress: called after each image with the number done and `images`.

    Returns:
        `root`.

    Raises:
        DataError: `root` holds something else, a number is too small, or the disk is full.
    """
    if images < MINIMUM_IMAGES:
        raise DataError(f"at least {MINIMUM_IMAGES} images, not {images}, give patients of every class in every split")
    if side < MINIMUM_SIDE:
        raise DataError(f"synthetic images have a side of at least {MINIMUM_SIDE} pixels, not {side}")
    if seed < 0:
        raise DataError(f"the seed can't be negative, as {seed} is")
    root = Path(root)
    _clear(root)
    # The README goes first, so that an interrupted call can be repeated; the table goes last, so that a part can't be
    # read.
    write_text(root / README, _readme(images, seed, side))
    planned = list(islice(_plan(seed), images))
    # Only this thread writes: `atomic_path` reads the umask by setting it, which two threads can't do at once.
    with closing(map_ahead(lambda image: _render(image, seed, side), planned, workers=4, ahead=32)) as rendered:
        for done, (image, files) in enumerate(zip(planned, rendered, strict=True), start=1):
            for folder, content in zip(_FOLDERS, files, strict=True):
                with atomic_path(root / folder / str(image.row["img_id"])) as path:
                    path.write_bytes(content)
            if progress is not None:
                progress(done, images)
    write_csv(root / "metadata.csv", pd.DataFrame([image.row for image in planned], columns=COLUMNS))
    return root


def _clear(root: Path) -> None:
    """Empty the folder of a synthetic sample, and refuse any other folder that holds something."""
    if root.is_file():
        raise DataError(f"{root} is a file; give a folder for the synthetic sample")
    if not root.exists() or not any(root.iterdir()):
        return
    readme = root / README
    if not readme.is_file() or not readme.read_text(encoding="utf-8", errors="replace").startswith(_MARKS):
        raise DataError(f"{root} holds something that isn't a synthetic sample; give a new or empty folder")
    # Only what this program named: a file that someone has put beside it stays.
    (root / "metadata.csv").unlink(missing_ok=True)
    for path in (path for folder in _FOLDERS for path in root.glob(f"{folder}/PAT_*.png")):
        if _IMAGE_NAME.fullmatch(path.name):
            path.unlink()


def _readme(images: int, seed: int, side: int) -> str:
    return f"""{_MARKS[0]}

THE IMAGES AND THE PATIENTS IN THIS FOLDER ARE MADE BY A PROGRAM.
They show no human being. They are for testing software only: no number measured on them says anything about
how well a method reads real skin lesions, and nothing trained on them may be used on a patient.

{images} images of {side} x {side} pixels, seed {seed}, in the layout of PAD-UFES-20 (metadata.csv, images/).
masks/ holds the true outline of each lesion, for checking where a model looks.
Made by dualrefnet; licence Apache-2.0.
"""


def _plan(seed: int) -> Iterator[_Image]:
    """Draw patients, their lesions and the images of them, without end; a longer sample begins like a shorter one."""
    index = lesion = 0
    for patient, label in enumerate(_labels(seed), start=1):
        rng = np.random.default_rng([seed, patient, _PATIENT])
        person, skin_type = _draw_patient(label, rng)
        left = 5
        for number in range(int(rng.choice([1, 2, 3], p=[0.70, 0.22, 0.08]))):
            lesion += 1
            other = number > 0 and rng.random() < 0.5
            its_label = str(rng.choice(_PROFILES[label].others)) if other else label
            values, diameter = _draw_lesion_metadata(its_label, rng)
            shared: dict[str, str | None] = {**person, **values}
            shared |= {"patient_id": f"PAT_{patient}", "lesion_id": str(lesion), "diagnostic": its_label}
            if rng.random() < _PROFILES[its_label].missing:
                shared.update(dict.fromkeys(MISSING_TOGETHER))
            shots = min(left, 1 + int(rng.random() < 0.24))
            left -= shots
            for _ in range(shots):
                row = {**shared, "img_id": f"PAT_{patient}_{lesion}_{index}.png"}
                yield _Image(row, index, lesion, its_label, skin_type, diameter)
                index += 1


def _labels(seed: int) -> Iterator[str]:
    """Deal the class of one patient after another."""
    for deal in count():
        deck = pad_ufes_20.CLASSES if deal < _EVEN_ROUNDS else _DECK
        yield from (str(label) for label in np.random.default_rng([seed, deal, _DEAL]).permutation(deck))


def _draw_patient(label: str, rng: np.random.Generator) -> tuple[dict[str, str], int]:
    """Return what all rows of one patient share, and the Fitzpatrick type."""
    skin_type = int(rng.choice(6, p=[0.11, 0.48, 0.25, 0.09, 0.05, 0.02])) + 1
    father, mother = (str(origin) for origin in rng.choice(list(_ORIGINS), 2, p=list(_ORIGINS.values())))
    piped = rng.random() < 0.62
    person = {
        "smoke": str(rng.random() < 0.14),
        "drink": str(rng.random() < 0.25),
        "background_father": father,
        "background_mother": father if rng.random() < 0.6 else mother,
        "age": str(int(np.clip(rng.normal(*_PROFILES[label].age), 6, 94))),
        "pesticide": str(rng.random() < 0.40),
        "gender": "FEMALE" if rng.random() < 0.5 else "MALE",
        "skin_cancer_history": str(rng.random() < 0.45),
        "cancer_history": str(rng.random() < 0.52),
        "has_piped_water": str(piped),
        "has_sewage_system": str(rng.random() < (0.85 if piped else 0.12)),
        "fitspatrick": f"{skin_type}.0",
    }
    return person, skin_type


def _draw_lesion_metadata(label: str, rng: np.random.Generator) -> tuple[dict[str, str], int]:
    """Return what all rows of one lesion share, and its longest diameter in mm."""
    profile = _PROFILES[label]
    regions = pad_ufes_20.SCHEMA.field("region").categories
    weight = np.array([profile.regions.get(region, 1.0) for region in regions])
    diameter = int(np.clip(round(rng.lognormal(np.log(profile.diameter), 0.45)), 2, 70))
    values = {symptom: str(rng.random() < chance) for symptom, chance in zip(SYMPTOMS, profile.symptoms, strict=True)}
    if rng.random() < profile.unknown:
        values.update(grew="UNK", changed="UNK")
    values["region"] = str(rng.choice(regions, p=weight / weight.sum()))
    values["diameter_1"] = f"{diameter}.0"
    values["diameter_2"] = f"{max(1, round(diameter * rng.uniform(0.5, 1)))}.0"
    values["biopsed"] = str(label in pad_ufes_20.MALIGNANT or rng.random() < 0.2)
    return values, diameter


def _render(image: _Image, seed: int, side: int) -> tuple[bytes, bytes]:
    """Return the files of one image and its mask."""
    lesion = draw_lesion(image.label, np.random.default_rng([seed, image.lesion, _LESION]))
    hairs = _HAIRS.get(str(image.row["region"]), 1.0)
    radius = 0.10 + 0.0065 * image.diameter
    streams = [np.random.default_rng([seed, image.number]) for _ in _FOLDERS]
    pixels = render_lesion(lesion, image.skin_type, radius, hairs, streams[0], side)
    # Noise never repeats: without the search for repetitions files are smaller and written four times faster.
    return _png(pixels, compress_type=zlib.Z_HUFFMAN_ONLY), _png(lesion_mask(lesion, radius, streams[1], side))


def _png(pixels: NDArray[np.uint8] | NDArray[np.bool_], **options: int) -> bytes:
    """Return the bytes of a PNG; booleans become 0 and 255, a bit each."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", **options)
    return content.getvalue()
