import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualrefnet.analysis import non_lesion_images as module
from dualrefnet.analysis.non_lesion_drawings import draw_bar_code, draw_one_colour, photographed
from dualrefnet.analysis.non_lesion_images import (
    CUTTINGS,
    DOCUMENTS,
    MEDICAL,
    PHOTOGRAPHS,
    PLAIN,
    cut_skin,
    everyday_pictures,
    medical_pictures,
)

SKIN, LESION = (200, 150, 120), (60, 30, 20)


@pytest.fixture(scope="module")
def halves() -> dict[str, list[module.EverydayPicture]]:
    return {"choosing": list(everyday_pictures("choosing")), "reporting": list(everyday_pictures("reporting"))}


def test_the_halves_share_no_source_and_no_picture(halves: dict[str, list[module.EverydayPicture]]) -> None:
    choosing, reporting = ({item.source for item in half} for half in halves.values())
    assert not choosing & reporting
    assert len(choosing) >= 15
    assert len(reporting) >= 15
    pixels = [item.pixels.tobytes() for half in halves.values() for item in half]
    assert len(set(pixels)) == len(pixels)


def test_both_halves_hold_photographs_documents_and_plain_areas_of_a_photographs_size(
    halves: dict[str, list[module.EverydayPicture]],
) -> None:
    for half in halves.values():
        assert {item.group for item in half} == {PHOTOGRAPHS, DOCUMENTS, PLAIN}
        assert len(half) == CUTTINGS * len({item.source for item in half})
        for item in half:
            assert item.pixels.dtype == np.uint8
            assert item.pixels.shape[2] == 3
            assert min(item.pixels.shape[:2]) >= 190
            assert item.pixels.flags.c_contiguous


def test_no_picture_of_people_is_among_them(halves: dict[str, list[module.EverydayPicture]]) -> None:
    sources = {item.source for half in halves.values() for item in half} | {item.source for item in medical_pictures()}
    assert not sources & {"astronaut.png", "camera.png", "lfw_subset.npy", "face"}


def test_the_seed_fixes_them_and_another_draws_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CUTTINGS", 2)
    first, again, other = (list(everyday_pictures("reporting", seed)) for seed in (3, 3, 4))
    assert all((a.pixels == b.pixels).all() for a, b in zip(first, again, strict=True))
    drawn = [place for place, item in enumerate(first) if item.source == "draw_table"]
    assert not any(np.array_equal(first[place].pixels, other[place].pixels) for place in drawn)


def test_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert {item.group for item in medical_pictures()} == {MEDICAL}


def test_drawn_things_look_like_what_they_are() -> None:
    random = np.random.default_rng(0)
    assert len(np.unique(draw_one_colour(random).reshape(-1, 3), axis=0)) == 1
    # A bar code: each column through the bars is of one colour, and many bars alternate.
    bars = draw_bar_code(random)[100:360].astype(int).sum(axis=2)
    assert (bars == bars[0]).all()
    assert (np.diff(bars[0]) != 0).sum() >= 100
    sheet = np.full((300, 200, 3), 255, np.uint8)
    shot = photographed(sheet, random)
    assert shot.shape == sheet.shape
    assert shot[140:160, 90:110].std() > 0


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
    found = cut_skin(*_photograph(tmp_path, centre=(200, 150), radius=80))
    assert found is not None
    assert (found.skin == SKIN).all()
    # Right of the lesion lie 370 columns, of which the margin takes 18.
    assert 330 <= len(found.skin) <= 358
    assert found.lesion.shape == found.skin.shape
    # As large a square holds all of the lesion, which would have 20106 pixels.
    assert (found.lesion == LESION).all(axis=2).sum() == pytest.approx(np.pi * 80**2, rel=0.01)


def test_the_lesions_square_is_centred_on_it_or_as_near_as_the_edge_allows(tmp_path: Path) -> None:
    found = cut_skin(*_photograph(tmp_path, centre=(200, 300), radius=60))
    assert found is not None
    rows, columns = np.nonzero((found.lesion == LESION).all(axis=2))
    assert rows.mean() == pytest.approx(len(found.lesion) / 2, abs=4)
    assert columns.mean() == pytest.approx(len(found.lesion) / 2, abs=4)
    corner = cut_skin(*_photograph(tmp_path, centre=(30, 30), radius=25))
    assert corner is not None
    assert (corner.lesion[0, 30] == LESION).all() or (corner.lesion[10, 30] == LESION).all()


def test_without_room_or_without_a_lesion_there_is_nothing_to_cut(tmp_path: Path) -> None:
    assert cut_skin(*_photograph(tmp_path, centre=(200, 300), radius=400)) is None
    assert cut_skin(*_photograph(tmp_path, centre=(200, 300), radius=255)) is None
    photograph, mask = _photograph(tmp_path, centre=(-900, 0), radius=10)
    assert cut_skin(photograph, mask) is None


def test_real_photographs_give_skin_that_is_unlike_the_lesion(real_pad: Path) -> None:
    masks = sorted((real_pad / "masks").glob("*.png"))[:12]
    found = [cut_skin(real_pad / "images" / f"{path.stem}.jpg", path) for path in masks]
    assert sum(item is not None for item in found) >= 8
    assert all(
        item.skin.shape == item.lesion.shape and not np.array_equal(item.skin, item.lesion) for item in found if item
    )
