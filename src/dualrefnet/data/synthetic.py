"""The drawn sample: a small data set in the layout of PAD-UFES-20 whose pictures and patients a program makes up.

It lets everything be tried and tested without a download. It is made so that neither the picture nor the patient's
answers tell the whole class, as in PAD-UFES-20, and it has that data set's shortcuts too: 13 columns are missing
together, and never for a cancer; every cancer was biopsied. Beside the pictures lie masks, the true outlines of the
drawn
lesions: for checking where a model looks, never for training.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from dualrefnet.data import pad_ufes_20
from dualrefnet.data.adapters import Dataset
from dualrefnet.data.synthetic_lesions import draw_lesion, outline, photograph
from dualrefnet.errors import DataError
from dualrefnet.files import atomic_path, write_csv, write_text

MINIMUM_IMAGES = 60
MINIMUM_SIDE = 64
README = "README.txt"

SCHEMA = pad_ufes_20.SCHEMA.model_copy(
    update={
        "name": "sample",
        "title": "Drawn sample (made by a program, not clinical)",
        "licence": "Apache-2.0",
        "citation": "The drawn sample of dualrefnet: pictures and patients made up by a program, for testing software only",
        "official_rows": None,
        "drawn": True,
    }
)

MISSING_TOGETHER = (
    *(
        "smoke",
        "drink",
        "background_father",
        "background_mother",
        "pesticide",
        "gender",
        "skin_cancer_history",
        "cancer_history",
    ),
    *("has_piped_water", "has_sewage_system", "fitspatrick", "diameter_1", "diameter_2"),
)
SYMPTOMS = ("itch", "grew", "hurt", "changed", "bleed", "elevation")
# The published order: the fields of the form as they stand in the schema, with the ids and the diagnosis among them.
_FIELDS = [field.name for field in SCHEMA.fields]
COLUMNS = ["patient_id", "lesion_id", *_FIELDS[:-6], "diagnostic", *_FIELDS[-6:], "img_id", "biopsed"]

_MARK = "DRAWN SAMPLE, NOT CLINICAL"
_FOLDERS = ("images", "masks")
_IMAGE_NAME = re.compile(r"PAT_\d+_\d+_\d+\.png")
# Every photograph has the random stream [seed, number]; these third numbers keep the other streams apart from it.
_PATIENT, _LESION, _DEAL = 1, 2, 3


class _Profile(NamedTuple):
    """What the patients and lesions of one class tend to be like.

    Attributes:
        age: mean and spread in years.
        diameter: median in mm.
        symptoms: chance of each of `SYMPTOMS`.
        unasked: chance that growth and change are `UNK`.
        missing: chance that `MISSING_TOGETHER` is missing.
        beside: the classes of a patient's further lesions that aren't of this class.
        regions: weight of each region; every other region has 1.
    """

    age: tuple[float, float]
    diameter: float
    symptoms: tuple[float, float, float, float, float, float]
    unasked: float
    missing: float
    beside: tuple[str, ...]
    regions: dict[str, float]


class _Photo(NamedTuple):
    """One image to draw: its row of `metadata.csv`, and what is true of it even where the row is silent."""

    row: dict[str, str | None]
    number: int
    lesion: int
    label: str
    skin_type: int
    diameter: int


# After PAD-UFES-20. MEL and SEK answer much alike and differ in the picture; ACK and SCC, NEV and SEK the other way
# round.
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
# card
# a class: the smallest sample, too, has several patients of every class.
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


def load(root: Path) -> Dataset:
    """Read a drawn sample.

    Raises:
        DataError: see `dualrefnet.data.pad_ufes_20.load`.
    """
    return pad_ufes_20.load(root, SCHEMA)


def draw_sample(
    root: Path, images: int = 420, seed: int = 0, side: int = 192, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw the sample into a folder; a sample that is already there is replaced.

    One seed gives the same bytes with the same versions of NumPy, OpenCV and Pillow, and the images of a smaller sample
    are the first images of a larger one.

    Args:
        root: new or empty folder, or that of a drawn sample.
        images: number of images.
        seed: what to draw; not negative.
        side: side of an image in pixels.
        progress: called after each image with the number done and `images`.

    Returns:
        `root`.

    Raises:
        DataError: `root` holds something else, a number is too small, or the disk is full.
    """
    if images < MINIMUM_IMAGES:
        raise DataError(
            f"a drawn sample needs at least {MINIMUM_IMAGES} images to have patients of every class in every split; {images} were asked for"
        )
    if side < MINIMUM_SIDE:
        raise DataError(
            f"images of the drawn sample have a side of at least {MINIMUM_SIDE} pixels; {side} was asked for"
        )
    if seed < 0:
        raise DataError(f"the seed of the drawn sample can't be negative; {seed} was given")
    root = Path(root)
    _clear(root)
    # The mark goes first, so that an interrupted drawing can be repeated; the table goes last, so that it can't be
    # read.
    write_text(root / README, _readme(images, seed, side))
    photos = list(islice(_photos(seed), images))
    with ThreadPoolExecutor(max_workers=4) as pool:
        # In portions: when a file can't be written, little has been drawn in vain.
        for start in range(0, images, 32):
            portion = photos[start : start + 32]
            drawn = pool.map(lambda photo: _draw(photo, seed, side), portion)
            # Only this thread writes: `atomic_path` reads the umask by setting it, which two threads can't do at once.
            for done, (photo, files) in enumerate(zip(portion, drawn, strict=True), start + 1):
                for folder, content in files.items():
                    with atomic_path(root / folder / str(photo.row["img_id"])) as path:
                        path.write_bytes(content)
                if progress is not None:
                    progress(done, images)
    write_csv(root / "metadata.csv", pd.DataFrame([photo.row for photo in photos], columns=COLUMNS))
    return root


def _clear(root: Path) -> None:
    """Empty the folder of a drawn sample, and refuse any other folder that holds something."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; give a folder for the drawn sample")
    if not root.exists() or not any(root.iterdir()):
        return
    readme = root / README
    if not readme.is_file() or not readme.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise DataError(f"{root} holds something that isn't a drawn sample; give a new or empty folder")
    # Only what this program named: a file that someone has put beside it stays.
    (root / "metadata.csv").unlink(missing_ok=True)
    for folder in _FOLDERS:
        for path in root.glob(f"{folder}/PAT_*.png"):
            if _IMAGE_NAME.fullmatch(path.name):
                path.unlink()


def _readme(images: int, seed: int, side: int) -> str:
    return f"""{_MARK}

THE PICTURES AND THE PATIENTS IN THIS FOLDER ARE MADE UP BY A PROGRAM.
They show no human being. They are for testing software only: no number measured on them says anything about
how well a method reads real skin lesions, and nothing trained on them may be used on a patient.

{images} images of {side} x {side} pixels, seed {seed}, in the layout of PAD-UFES-20 (metadata.csv, images/).
masks/ holds the true outline of each drawn lesion, for checking where a model looks.
Drawn by dualrefnet; licence Apache-2.0.
"""


def _photos(seed: int) -> Iterator[_Photo]:
    """Draw patients, their lesions and the photographs of them, without end; a longer sample begins like a shorter
    one.
    """
    index = lesion = 0
    for patient, label in enumerate(_labels(seed), start=1):
        rng = np.random.default_rng([seed, patient, _PATIENT])
        person, skin_type = _draw_person(label, rng)
        left = 5
        for number in range(int(rng.choice([1, 2, 3], p=[0.70, 0.22, 0.08]))):
            lesion += 1
            beside = number > 0 and rng.random() < 0.5
            its_label = str(rng.choice(_PROFILES[label].beside)) if beside else label
            answers, diameter = _draw_answers(its_label, rng)
            shared: dict[str, str | None] = {
                **person,
                **answers,
                "patient_id": f"PAT_{patient}",
                "lesion_id": str(lesion),
                "diagnostic": its_label,
            }
            if rng.random() < _PROFILES[its_label].missing:
                shared.update(dict.fromkeys(MISSING_TOGETHER))
            shots = min(left, 1 + int(rng.random() < 0.24))
            left -= shots
            for _ in range(shots):
                row = {**shared, "img_id": f"PAT_{patient}_{lesion}_{index}.png"}
                yield _Photo(row, index, lesion, its_label, skin_type, diameter)
                index += 1


def _labels(seed: int) -> Iterator[str]:
    """Deal the class of one patient after another."""
    for deal in count():
        deck = pad_ufes_20.CLASSES if deal < _EVEN_ROUNDS else _DECK
        yield from (str(label) for label in np.random.default_rng([seed, deal, _DEAL]).permutation(deck))


def _draw_person(label: str, rng: np.random.Generator) -> tuple[dict[str, str], int]:
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


def _draw_answers(label: str, rng: np.random.Generator) -> tuple[dict[str, str], int]:
    """Return what all rows of one lesion share, and its longest diameter in mm."""
    profile = _PROFILES[label]
    regions = pad_ufes_20.SCHEMA.field("region").categories
    weight = np.array([profile.regions.get(region, 1.0) for region in regions])
    diameter = int(np.clip(round(rng.lognormal(np.log(profile.diameter), 0.45)), 2, 70))
    answers = {symptom: str(rng.random() < chance) for symptom, chance in zip(SYMPTOMS, profile.symptoms, strict=True)}
    if rng.random() < profile.unasked:
        answers.update(grew="UNK", changed="UNK")
    answers["region"] = str(rng.choice(regions, p=weight / weight.sum()))
    answers["diameter_1"] = f"{diameter}.0"
    answers["diameter_2"] = f"{max(1, round(diameter * rng.uniform(0.5, 1)))}.0"
    answers["biopsed"] = str(label in pad_ufes_20.MALIGNANT or rng.random() < 0.2)
    return answers, diameter


def _draw(photo: _Photo, seed: int, side: int) -> dict[str, bytes]:
    """Draw one image and its mask; return the bytes of both files by folder."""
    lesion = draw_lesion(photo.label, np.random.default_rng([seed, photo.lesion, _LESION]))
    hairs = _HAIRS.get(str(photo.row["region"]), 1.0)
    radius = 0.10 + 0.0065 * photo.diameter
    picture = photograph(lesion, photo.skin_type, radius, hairs, np.random.default_rng([seed, photo.number]), side)
    mask = outline(lesion, radius, np.random.default_rng([seed, photo.number]), side)
    # Noise never repeats: without the search for repetitions files are smaller and written four times faster.
    parts = (_png(picture, compress_type=zlib.Z_HUFFMAN_ONLY), _png(mask))
    return dict(zip(_FOLDERS, parts, strict=True))


def _png(pixels: NDArray[np.uint8] | NDArray[np.bool_], **options: int) -> bytes:
    """Return the bytes of a PNG; truth values become 0 and 255, a bit each."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", **options)
    return content.getvalue()
