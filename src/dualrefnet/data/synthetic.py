"""The synthetic data set (`dualrefnet sample`): images and patients made by a program, in the layout of PAD-UFES-20.

It lets everything be tried and tested without a download; nothing here is clinical. As in PAD-UFES-20, neither the
image nor the metadata alone determines the class, and it has that data set's shortcuts too: 13 columns are missing
together, and never for a cancer; every cancer was biopsied. Beside the images lie masks, the true outlines of the
lesions: for checking where a model looks, never for training.

A lesion is a stack of maps on its own canvas (pigment, blood, scale, crust, relief); an image puts that canvas onto
skin with its own framing, light, focus and noise. Two images of one lesion therefore show the same lesion.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualrefnet.data import pad_ufes_20
from dualrefnet.data.store import map_ahead
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
# way round.
# fmt: off
_PROFILES = {
    "ACK": _Profile((62, 12), 10, (0.75, 0.20, 0.08, 0.06, 0.10, 0.25), 0.03, 0.56, ("BCC", "SCC", "SEK"),
                    {"FOREARM": 22, "FACE": 14, "HAND": 9, "ARM": 9, "NOSE": 3}),
    "BCC": _Profile((64, 12), 11, (0.68, 0.55, 0.35, 0.15, 0.52, 0.82), 0.28, 0.00, ("ACK", "SCC"),
                    {"FACE": 20, "NOSE": 12, "CHEST": 10, "BACK": 8, "NECK": 5, "EAR": 3}),
    "MEL": _Profile((59, 14), 14, (0.22, 0.68, 0.05, 0.55, 0.10, 0.35), 0.18, 0.00, ("NEV", "SEK"),
                    {"BACK": 16, "ARM": 8, "THIGH": 8, "CHEST": 7, "FACE": 7, "FOREARM": 5}),
    "NEV": _Profile((38, 15), 9, (0.12, 0.45, 0.03, 0.12, 0.03, 0.55), 0.12, 0.62, ("SEK",),
                    {"BACK": 18, "FACE": 10, "CHEST": 8, "ABDOMEN": 5, "THIGH": 5}),
    "SCC": _Profile((69, 11), 13, (0.70, 0.60, 0.35, 0.20, 0.40, 0.80), 0.34, 0.00, ("ACK", "BCC"),
                    {"FACE": 9, "FOREARM": 9, "HAND": 9, "ARM": 7, "EAR": 6, "BACK": 5, "LIP": 4}),
    "SEK": _Profile((64, 12), 10, (0.28, 0.48, 0.03, 0.08, 0.05, 0.72), 0.04, 0.66, ("ACK", "NEV"),
                    {"FACE": 20, "BACK": 12, "CHEST": 9, "ARM": 5}),
}
_ORIGINS = {
    "POMERANIA": 0.30, "GERMANY": 0.28, "ITALY": 0.13, "BRAZIL": 0.12, "BRASIL": 0.02, "PORTUGAL": 0.03, "UNK": 0.12,
}
_HAIRS = {
    "SCALP": 14.0, "FOREARM": 6.0, "ARM": 4.0, "THIGH": 5.0, "CHEST": 5.0, "BACK": 2.5, "ABDOMEN": 3.0, "HAND": 2.0,
}
# fmt: on
# The patients' classes are dealt from a shuffled deck, so that no seed makes a class rare. The first rounds deal one
# card a class: the smallest sample, too, has several patients of every class.
_EVEN_ROUNDS = 4
_DECK = (*("ACK", "BCC") * 5, *("NEV", "SEK") * 3, *("MEL", "SCC") * 2)


def make_synthetic(root: Path, images: int = 420, seed: int = 0, side: int = 192) -> Path:
    """Make the synthetic sample in a new or empty folder, or that of an earlier sample, which is replaced.

    One seed gives the same bytes, and a smaller sample's images are the first of a larger one.
    """
    import pandas as pd

    if images < MINIMUM_IMAGES:
        raise DataError(f"at least {MINIMUM_IMAGES} images, not {images}, give patients of every class in every split")
    if side < MINIMUM_SIDE:
        raise DataError(f"synthetic images have a side of at least {MINIMUM_SIDE} pixels, not {side}")
    if seed < 0:
        raise DataError(f"the seed can't be negative, as {seed} is")
    root = Path(root)
    _clear(root)
    # The README goes first, so that an interrupted call can be repeated; the table last: a part can't be read.
    write_text(root / README, _readme(images, seed, side))
    planned = list(islice(_plan(seed), images))
    with closing(map_ahead(lambda image: _render(image, seed, side), planned, 4, 32, "drawing")) as rendered:
        for image, files in zip(planned, rendered, strict=True):
            for folder, content in zip(_FOLDERS, files, strict=True):
                with atomic_path(root / folder / str(image.row["img_id"])) as path:
                    path.write_bytes(content)
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
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", **options)
    return content.getvalue()


# Rendering

Map = NDArray[np.float32]
Random = np.random.Generator

_CANVAS = 128  # pixels along a side of a lesion's canvas
_REACH = 1.6  # the canvas spans -1.6..1.6 mean radii of the lesion
_ANGLES = 360
MASK_SIDE = 300  # pixels along a side of a mask, whatever the image's side

# Colours are RGB, 0..1. Pigments absorb: a channel is multiplied by exp(-density * absorption).
_SKIN_TONES = [[244, 212, 194], [235, 194, 168], [221, 174, 142], [188, 137, 102], [139, 94, 67], [94, 63, 49]]
_SKIN = np.array(_SKIN_TONES, np.float32) / 255
# Of melanin, blood, and blue-grey pigment.
_ABSORPTION = np.array([[0.85, 1.45, 1.95], [0.09, 0.78, 0.68], [1.60, 1.15, 0.75]], np.float32)
_SCALE = np.array([0.93, 0.88, 0.80], np.float32)
_KERATIN = np.array([0.86, 0.71, 0.46], np.float32)
_CLOT = np.array([0.33, 0.10, 0.08], np.float32)
_HAIR = np.array([0.16, 0.11, 0.08], np.float32)

_axis = np.linspace(-_REACH, _REACH, _CANVAS, dtype=np.float32)
_X, _Y = np.meshgrid(_axis, _axis)
_RADIUS = np.hypot(_X, _Y)
_ANGLE_INDEX = ((np.arctan2(_Y, _X) / (2 * np.pi)) * _ANGLES).astype(int) % _ANGLES


class Style(NamedTuple):
    """How a lesion looks; every value lies in 0..1."""

    melanin: float  # amount of brown pigment
    variegation: float  # how many tones the pigment has, and how much of it is blue-grey
    redness: float  # amount of blood
    pearl: float  # pale, translucent, with a rolled border
    irregularity: float  # of the outline
    softness: float  # width of the border
    patchiness: float  # share of the lesion that is missing
    scale: float  # pale flakes
    crust: float  # keratin and clots in the middle
    vessels: float  # number of small vessels
    dome: float  # height above the skin
    bumps: float  # unevenness of that height
    gloss: float  # strength of the reflections
    pits: float  # number of dark plugs


STYLES = {
    "ACK": Style(0.05, 0.10, 0.45, 0.00, 0.60, 0.90, 0.55, 0.60, 0.05, 0.10, 0.10, 0.35, 0.05, 0.00),
    "BCC": Style(0.08, 0.30, 0.42, 0.75, 0.25, 0.30, 0.00, 0.05, 0.22, 0.80, 0.65, 0.15, 0.80, 0.00),
    "MEL": Style(0.78, 0.95, 0.20, 0.00, 0.85, 0.30, 0.12, 0.00, 0.03, 0.00, 0.12, 0.15, 0.20, 0.00),
    "NEV": Style(0.60, 0.15, 0.12, 0.00, 0.12, 0.30, 0.00, 0.00, 0.00, 0.00, 0.30, 0.08, 0.25, 0.00),
    "SCC": Style(0.10, 0.20, 0.80, 0.10, 0.50, 0.45, 0.10, 0.50, 0.55, 0.20, 0.65, 0.55, 0.20, 0.00),
    "SEK": Style(0.58, 0.35, 0.10, 0.00, 0.30, 0.08, 0.00, 0.15, 0.05, 0.00, 0.50, 0.75, 0.45, 0.75),
}
# The class that a lesion may take after: these pairs are told apart by the metadata rather than by the image.
LOOKALIKES = {"ACK": "SCC", "SCC": "ACK", "NEV": "SEK", "SEK": "NEV", "MEL": "SEK", "BCC": "NEV"}


class Lesion(NamedTuple):
    """A lesion on its own canvas."""

    pigments: Map  # (128, 128, 3) densities of melanin, blood and blue-grey pigment
    surface: Map  # (128, 128, 3) cover by scale, cover by crust, and height
    crust_colour: Map  # RGB in 0..1
    gloss: float  # strength of the reflections
    depth: Map  # (128, 128), 1 in the middle, 0 on the outline, negative outside


def draw_lesion(label: str, rng: Random) -> Lesion:
    """Draw a lesion of a class of PAD-UFES-20, somewhere between the class's own style and that of its lookalike."""
    style = _draw_style(label, rng)
    depth = _depth(style, rng)
    mask = np.clip(depth / (0.06 + 0.55 * style.softness) + 0.5, 0, 1)
    mask = mask * mask * (3 - 2 * mask)
    if style.patchiness > 0.02:
        mask = mask * np.clip(1.15 - style.patchiness * (0.9 + 0.8 * _noise(rng, 9)), 0, 1)

    tone = _noise(rng, 5)
    # Pigment never runs out wholly; a pearly lesion is paler than the skin around it.
    tones = np.maximum(1.05 + 0.55 * style.variegation * tone + 0.10 * _noise(rng, 30), 0.25)
    melanin = style.melanin * tones - 0.22 * style.pearl
    blue = 0.8 * style.variegation * style.melanin * np.clip(_noise(rng, 4) - 0.4, 0, 1)
    dark_red = 0.30 * style.variegation * style.melanin * np.clip(-tone - 0.4, 0, 1)
    blood = style.redness * (0.75 + 0.25 * _noise(rng, 8)) + dark_red
    blood = blood + 0.9 * _vessels(style, rng)
    plugs, pearls = _dots(rng, int(26 * style.pits)), _dots(rng, int(8 * style.pits))
    melanin = melanin + 0.9 * plugs - 0.4 * pearls

    flakes = np.clip(1.6 * (_noise(rng, 26) + 0.6 * _noise(rng, 10) - 1.5 + 1.7 * style.scale), 0, 1)
    flakes = flakes * min(1.0, 2 * style.scale)
    middle = np.clip(4 * (depth - 1.2 + 1.25 * style.crust + 0.18 * _noise(rng, 12)), 0, 1)
    crust_colour = _KERATIN + (_CLOT - _KERATIN) * np.float32(rng.beta(0.7, 0.9))

    rolled_border = 0.35 * style.pearl * np.exp(-(((depth - 0.2) / 0.12) ** 2))
    dome = style.dome * np.sqrt(np.clip(1.6 * depth, 0, 1)) + rolled_border
    rough = 0.10 * style.bumps * _noise(rng, 16) + 0.05 * (style.crust * middle + flakes) * _noise(rng, 40)
    pigments = np.dstack([melanin, blood, blue]) * mask[..., None]
    surface = np.dstack([flakes * mask, middle * mask, (dome + rough - 0.12 * plugs) * mask])
    maps = [values.astype(np.float32) for values in (pigments, surface, depth)]
    return Lesion(maps[0], maps[1], crust_colour, style.gloss, maps[2])


def render_lesion(
    lesion: Lesion, skin_type: int, radius: float, hairs: float, rng: Random, side: int
) -> NDArray[np.uint8]:
    """Render a lesion on skin of a Fitzpatrick type, (side, side, 3); `radius` is a share of the side."""
    frame = _framing(radius, rng, side)
    melanin, blood, blue = cv2.split(cv2.warpAffine(lesion.pigments, frame, (side, side), flags=cv2.INTER_LINEAR))
    scale, crust, height = cv2.split(cv2.warpAffine(lesion.surface, frame, (side, side), flags=cv2.INTER_LINEAR))

    tone, skin_melanin, skin_blood, relief = _skin(skin_type, rng, side)
    # Planes of one colour, (3, side, side): NumPy multiplies them by a map several times faster than (side, side, 3).
    # The skin's own colour carries through pigment, as in life: the same mole is darker on darker skin.
    density = zip(_ABSORPTION, (melanin + skin_melanin, blood + skin_blood, blue), strict=True)
    image = cv2.exp(-sum(absorption[:, None, None] * amount for absorption, amount in density))
    image *= tone[:, None, None] * relief
    grain = 1 + 0.10 * _noise(rng, side // 3, side)
    image += (0.62 * scale) * (_SCALE[:, None, None] * grain - image)
    image += (0.80 * crust) * (lesion.crust_colour[:, None, None] * grain - image)

    slope_x, slope_y = (cv2.Sobel(height, cv2.CV_32F, *order, ksize=3, scale=side / 192) for order in ((1, 0), (0, 1)))
    direction = rng.uniform(0, 2 * np.pi)
    facing = np.float32(np.cos(direction)) * slope_x + np.float32(np.sin(direction)) * slope_y
    across = np.float32(np.sin(direction)) * slope_x - np.float32(np.cos(direction)) * slope_y
    image *= np.clip(1 + 0.55 * facing, 0.45, 1.5)
    shine = cv2.exp(-(((facing - 0.28) / 0.12) ** 2) - (across / 0.16) ** 2) * (0.45 * lesion.gloss)
    image += shine * (1 - image)

    _add_hairs(image, int(rng.poisson(hairs)), rng)
    return _expose(image, direction, rng)


def lesion_mask(lesion: Lesion, radius: float, rng: Random, side: int) -> NDArray[np.bool_]:
    """Return the true mask, (300, 300), of the lesion that `render_lesion` draws with the same stream."""
    # The framing is the first thing that `render_lesion` draws. Pixels are counted from the middle of the first one.
    frame = _framing(radius, rng, side) * (MASK_SIDE / side)
    frame[:, 2] += (MASK_SIDE / side - 1) / 2
    depth = cv2.warpAffine(lesion.depth, frame, (MASK_SIDE, MASK_SIDE), flags=cv2.INTER_LINEAR, borderValue=-1)
    return np.asarray(depth > 0)


def _draw_style(label: str, rng: Random) -> Style:
    """Mix the class's style with its lookalike's, then vary every value."""
    own, other = np.array(STYLES[label]), np.array(STYLES[LOOKALIKES[label]])
    values = own + rng.beta(0.7, 1.6) * (other - own)
    values = values * rng.lognormal(0, 0.25, len(values)) + rng.normal(0, 0.02, len(values))
    return Style(*(float(value) for value in np.clip(values, 0, 1)))


def _depth(style: Style, rng: Random) -> Map:
    """Return 1 in the lesion's middle, 0 on its outline, negative outside."""
    angle = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
    wave = np.arange(2, 9)
    height = 0.16 * style.irregularity * rng.standard_normal(len(wave)) / (wave / 2)
    outline = 1 + height @ np.cos(wave[:, None] * angle + rng.uniform(0, 2 * np.pi, (len(wave), 1)))
    # An ellipse of the same area; irregular lesions are longer.
    longer = np.sqrt(rng.uniform(1, 1.25 + 0.5 * style.irregularity))
    outline = outline / np.hypot(np.cos(angle) / longer, np.sin(angle) * longer)
    ragged = 0.03 * _noise(rng, 24) + 0.05 * _noise(rng, 10)
    radius = np.maximum(outline, 0.3).astype(np.float32)[_ANGLE_INDEX]
    return np.asarray(1 - _RADIUS / radius + (0.15 + style.irregularity) * ragged)


def _noise(rng: Random, cells: int, side: int = _CANVAS) -> Map:
    """Return smooth noise of mean 0 and standard deviation about 1, (side, side), with `cells` grains along a side."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    # Straight lines between grains can't be seen where grains are small, and cost a third.
    shape = cv2.INTER_CUBIC if 6 * cells < side else cv2.INTER_LINEAR
    # Interpolation averages neighbours; 1.4 restores the standard deviation.
    return np.asarray(np.float32(1.4) * cv2.resize(coarse, (side, side), interpolation=shape))


def _vessels(style: Style, rng: Random) -> Map:
    """Draw thin branching lines from the border inwards."""
    layer = np.zeros((_CANVAS, _CANVAS), np.uint8)
    for _ in range(int(rng.poisson(9 * style.vessels))):
        heading = rng.uniform(0, 2 * np.pi)
        start = np.array([np.cos(heading), np.sin(heading)]) * rng.uniform(0.45, 0.95)
        turns = heading + np.pi + np.cumsum(rng.normal(0, 0.5, 9))
        path = start + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * rng.uniform(0.05, 0.10), axis=0)
        _polyline(layer, (path + _REACH) * _CANVAS / (2 * _REACH), 255)
    return np.asarray(layer, np.float32) / np.float32(255)


def _dots(rng: Random, count: int) -> Map:
    """Draw round dots inside the lesion."""
    layer = np.zeros((_CANVAS, _CANVAS), np.uint8)
    places, sizes = rng.normal(0, 0.42, (2, count)), rng.uniform(0.9, 2.2, count)
    for (x, y), size in zip(places.T, sizes, strict=True):
        middle = (round((x + _REACH) * 8 * _CANVAS / _REACH), round((y + _REACH) * 8 * _CANVAS / _REACH))
        cv2.circle(layer, middle, round(16 * size), 255, -1, cv2.LINE_AA, shift=4)
    return np.asarray(cv2.GaussianBlur(layer, (0, 0), 0.8) / np.float32(255))


def _framing(radius: float, rng: Random, side: int) -> NDArray[np.float64]:
    """Return the 2x3 matrix from canvas pixels to image pixels: any turn, some zoom, slant and shift."""
    pixels = np.clip(radius * rng.lognormal(0, 0.18), 0.10, 0.33) * side
    turn, slant = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    squeeze = np.diag([1.0, rng.uniform(0.88, 1)])
    turned, slanted = (np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (turn, slant))
    matrix = slanted @ squeeze @ slanted.T @ turned * (pixels * 2 * _REACH / _CANVAS)
    centre = side * (0.5 + rng.normal(0, 0.05, 2).clip(-0.12, 0.12))
    return np.column_stack([matrix, centre - matrix @ [_CANVAS / 2, _CANVAS / 2]])


def _skin(skin_type: int, rng: Random, side: int) -> tuple[Map, Map, Map, Map]:
    """Draw bare skin: RGB tone (3,), and maps of melanin and blood beyond that tone, and of the furrows' brightness."""
    tone = _SKIN[skin_type - 1] * (1 + 0.03 * rng.standard_normal(3, dtype=np.float32))
    blood = np.float32(0.10 * rng.random()) + 0.035 * _noise(rng, 5, side) + 0.02 * _noise(rng, 14, side)
    melanin = 0.012 * _noise(rng, 6, side) + 0.012 * _noise(rng, 30, side)
    freckles = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.poisson(1.5))):
        x, y = rng.uniform(0, side, 2)
        radius = int(16 * side * rng.uniform(0.004, 0.012))
        cv2.circle(freckles, (int(16 * x), int(16 * y)), radius, 255, -1, cv2.LINE_AA, shift=4)
    melanin += cv2.GaussianBlur(freckles, (0, 0), max(0.8, side / 160)) * np.float32(rng.uniform(0.1, 0.35) / 255)
    # Furrows are the zero lines of a noise: thin, branching, about as far apart as its grains.
    furrow = cv2.exp(-((_noise(rng, max(8, side // 7), side) / np.float32(0.35)) ** 2))
    relief = 1 - np.float32(rng.uniform(0.02, 0.07)) * furrow
    relief = relief + np.float32(rng.uniform(0.008, 0.02)) * _noise(rng, side // 2, side)
    return tone, melanin, blood, relief


def _add_hairs(image: Map, count: int, rng: Random) -> None:
    """Draw curved dark hairs that lie roughly one way, in place."""
    if count == 0:
        return
    side = image.shape[-1]
    layer = np.zeros((side, side), np.uint8)
    lie = rng.uniform(0, 2 * np.pi)
    for _ in range(count):
        turns = lie + rng.normal(0, 0.45) + np.cumsum(rng.normal(0, 0.10, 12))
        steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * side * rng.uniform(0.02, 0.055)
        path = rng.uniform(-0.1, 1.1, 2) * side + np.cumsum(steps, axis=0)
        _polyline(layer, path, int(rng.integers(130, 240)), 1 if side < 300 else 2)
    cover = layer * np.float32(0.85 / 255)
    image += cover * (_HAIR[:, None, None] * np.float32(rng.uniform(0.6, 2.2)) - image)


def _polyline(layer: NDArray[np.uint8], points: NDArray[np.float64], value: int, thickness: int = 1) -> None:
    """Draw a line through (x, y) points with an accuracy of 1/16 pixel, in place."""
    cv2.polylines(layer, [np.rint(points * 16).astype(np.int32)], False, value, thickness, cv2.LINE_AA, shift=4)


def _expose(image: Map, direction: float, rng: Random) -> NDArray[np.uint8]:
    """Add the light's fall-off and colour, the lens's blur and the sensor's noise."""
    side = image.shape[-1]
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope = np.float32(rng.uniform(0.02, 0.16))
    light = 1 - slope * (np.float32(np.cos(direction)) * axis[None, :] + np.float32(np.sin(direction)) * axis[:, None])
    light -= np.float32(rng.uniform(0, 0.14)) * (axis[None, :] ** 2 + axis[:, None] ** 2)
    warmth, tint = rng.normal(0, 0.075), rng.normal(0, 0.03)
    cast = np.exp(np.array([warmth, tint, -warmth], np.float32)) * np.float32(rng.uniform(0.88, 1.10))
    lit = cv2.merge(list(image * (cast[:, None, None] * light)))
    seen = cv2.GaussianBlur(lit, (0, 0), side / 192 * rng.uniform(0.3, 1.1))
    # Even noise is drawn six times faster than Gaussian noise, and the blur over nine pixels makes it look the same.
    noise = cv2.GaussianBlur(rng.random((side, side, 3), dtype=np.float32) - np.float32(0.5), (3, 3), 0.6)
    seen += noise * np.float32(rng.uniform(0.02, 0.09))
    # One pass rounds and clips at 255; it takes magnitudes, so what the noise made negative is cut before.
    return np.asarray(cv2.convertScaleAbs(np.maximum(seen, 0), alpha=255), np.uint8)
