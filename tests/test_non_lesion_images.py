from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualrefnet.analysis import non_lesion_images as module
from dualrefnet.analysis.non_lesion_images import CROPS, DOCUMENTS, PHOTOGRAPHS, PLAIN, crop_skin, everyday_images

SKIN, LESION = (200, 150, 120), (60, 30, 20)


def test_the_images_are_of_several_kinds_and_sources_and_show_no_people() -> None:
    images = list(everyday_images())
    sources = {image.source for image in images}
    assert len(images) == CROPS * len(sources) >= 15 * CROPS
    assert {image.group for image in images} == {PHOTOGRAPHS, DOCUMENTS, PLAIN}
    assert not sources & {"astronaut.png", "camera.png", "lfw_subset.npy"}
    assert len({image.pixels.tobytes() for image in images}) == len(images)
    assert all(min(image.pixels.shape[:2]) >= 190 and image.pixels.dtype == np.uint8 for image in images)


def test_the_seed_fixes_them_and_another_draws_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CROPS", 2)
    first, again, other = (list(everyday_images(seed)) for seed in (3, 3, 4))
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, again, strict=True))
    drawn = [place for place, item in enumerate(first) if item.source == "draw_table"]
    assert not any(np.array_equal(first[place].pixels, other[place].pixels) for place in drawn)


def _photograph(
    folder: Path, centre: tuple[int, int], radius: int, size: tuple[int, int] = (400, 600)
) -> tuple[Path, Path]:
    """Write a photograph with a round lesion, and its mask squashed to a square."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2
    Image.fromarray(np.where(inside[..., None], LESION, SKIN).astype(np.uint8)).save(folder / "p.png")
    Image.fromarray(inside.astype(np.uint8) * 255).resize((150, 150), Image.Resampling.NEAREST).save(folder / "m.png")
    return folder / "p.png", folder / "m.png"


def test_the_largest_square_beside_the_lesion_holds_none_of_it(tmp_path: Path) -> None:
    found = crop_skin(*_photograph(tmp_path, centre=(200, 150), radius=80))
    assert found is not None
    skin, lesion = found
    assert (skin == SKIN).all()
    # Right of the lesion lie 370 columns, of which the margin takes 18.
    assert 330 <= len(skin) <= 358
    assert lesion.shape == skin.shape
    # As large a square holds all of the lesion, which would have 20106 pixels.
    assert (lesion == LESION).all(axis=2).sum() == pytest.approx(np.pi * 80**2, rel=0.01)


def test_real_photographs_give_skin_that_is_unlike_the_lesion(real_pad: Path) -> None:
    masks = sorted((real_pad / "masks").glob("*.png"))[:12]
    found = [crop_skin(real_pad / "images" / f"{path.stem}.jpg", path) for path in masks]
    assert sum(item is not None for item in found) >= 8
    assert all(item[0].shape == item[1].shape and not np.array_equal(*item) for item in found if item)
