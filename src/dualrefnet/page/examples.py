"""Examples for the page, drawn by a program: three pictures with a patient's answers. Nothing of them is clinical."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.data.synthetic_lesions import draw_lesion, render_lesion

_SIDE = 384


@dataclass(frozen=True)
class Example:
    """One drawn case.

    Attributes:
        title: what is drawn, in words.
        picture: (384, 384, 3) RGB.
        answers: field -> answer, in the spellings of the data sets that this package reads.
    """

    title: str
    picture: NDArray[np.uint8]
    answers: dict[str, Any]


def _both(age: int, sex: str, region: str, site: str, **answers: Any) -> dict[str, Any]:
    """Spell a patient as each of the data sets asks."""
    return {
        "age": age,
        "age_approx": age,
        "gender": sex,
        "sex": sex,
        "region": region,
        "anatom_site_general": site,
        **answers,
    }


_CASES = (
    (
        "Drawn dark patch",
        ("MEL", 2, 0.23, 4, 5),
        _both(
            59,
            "male",
            "back",
            "posterior torso",
            itch=False,
            grew=True,
            hurt=False,
            changed=True,
            bleed=False,
            elevation=False,
            diameter_1=14,
            diameter_2=11,
            skin_cancer_history=False,
            fitspatrick=2,
        ),
    ),
    (
        "Drawn pearly bump",
        ("BCC", 2, 0.2, 2, 3),
        _both(
            68,
            "female",
            "nose",
            "head/neck",
            itch=True,
            grew=True,
            hurt=False,
            changed=False,
            bleed=True,
            elevation=True,
            diameter_1=8,
            diameter_2=7,
            skin_cancer_history=True,
            fitspatrick=2,
        ),
    ),
    (
        "Drawn even mole",
        ("NEV", 3, 0.18, 3, 8),
        _both(
            31,
            "female",
            "arm",
            "upper extremity",
            itch=False,
            grew=False,
            hurt=False,
            changed=False,
            bleed=False,
            elevation=False,
            diameter_1=5,
            diameter_2=4,
            skin_cancer_history=False,
            fitspatrick=3,
        ),
    ),
)


def draw_examples() -> list[Example]:
    """Draw the three examples; the same ones every time."""
    examples = []
    for title, (label, skin_type, radius, hairs, seed), answers in _CASES:
        rng = np.random.default_rng(seed)
        picture = render_lesion(draw_lesion(label, rng), skin_type, radius, hairs, rng, _SIDE)
        examples.append(Example(title, picture, answers))
    return examples
