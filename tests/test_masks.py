from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dualrefnet.data.images import decode_image, find_masks, image_size, read_mask
from dualrefnet.data.synthetic import make_synthetic
from dualrefnet.errors import DataError, ImageError
from dualrefnet.recipe import ImageSection
from dualrefnet.runtime.preprocessing import preprocess


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def photographed(path: Path, height: int, width: int, disc: tuple[int, int, int]) -> tuple[Path, Path]:
    """Write a photograph with a white disc (row, column, radius) on black, and the mask of it, squashed to 300x300."""
    rows, columns = np.mgrid[:height, :width]
    inside = np.hypot(rows - disc[0], columns - disc[1]) <= disc[2]
    photograph = save(path / "images" / "A.png", np.repeat(inside[..., None] * np.uint8(255), 3, axis=2))
    squashed = cv2.resize(inside.astype(np.float32), (300, 300), interpolation=cv2.INTER_AREA) > 0.5
    return photograph, save(path / "masks" / "A.png", squashed)


@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize(
    ("height", "width", "disc"), [(600, 450, (250, 200, 90)), (400, 800, (180, 480, 120)), (500, 500, (250, 250, 60))]
)
def test_a_mask_fits_the_picture_that_the_model_sees(tmp_path, fit, height, width, disc):
    photograph, path = photographed(tmp_path, height, width, disc)
    section = ImageSection(size=96, fit=fit, colour_constancy="none", clahe=False)
    seen = preprocess(decode_image(photograph), section)[..., 0] > 127
    mask = read_mask(path, photograph, 96, fit)
    # The mask was squashed to 300 pixels in between, which may cost a pixel along the border.
    assert mask.shape == (96, 96)
    assert mask.dtype == bool
    assert (mask & seen).sum() / (mask | seen).sum() > 0.97


def test_a_mask_of_known_pixels_is_squashed_and_cropped(tmp_path):
    # A photograph of 40 x 80: its left half is lesion.
    photograph = save(tmp_path / "A.png", np.zeros((40, 80, 3), np.uint8))
    left = np.zeros((10, 10), bool)
    left[:, :5] = True
    path = save(tmp_path / "mask.png", left)
    np.testing.assert_array_equal(read_mask(path, photograph, 4, "squash"), [[True, True, False, False]] * 4)
    # Cropped to the columns 20..60, it is still the left half: 20..40. Of a lesion in the columns 0..16 nothing is
    # left.
    np.testing.assert_array_equal(read_mask(path, photograph, 4, "crop"), [[True, True, False, False]] * 4)
    left[:, 2:] = False
    assert read_mask(save(tmp_path / "mask.png", left), photograph, 4, "crop") is None
    assert read_mask(path, photograph, 10, "squash").sum() == 20
    # In the columns 48..64, of which 48..60 are seen: the last 3 tenths.
    right = np.zeros((10, 10), bool)
    right[:, 6:8] = True
    cropped = read_mask(save(tmp_path / "mask.png", right), photograph, 20, "crop")
    np.testing.assert_array_equal(cropped[0], [False] * 14 + [True] * 6)


def test_an_empty_mask_is_none(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((10, 10), bool))
    assert read_mask(path, tmp_path / "not_looked_at.png", 8, "squash") is None


def test_a_pixel_is_lesion_over_127_in_any_mode(tmp_path):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for pixels in (grey, np.repeat(grey[..., None], 3, axis=2)):
        path = save(tmp_path / "mask.png", pixels)
        np.testing.assert_array_equal(read_mask(path, path, 4, "squash"), [[False, False, True, True]] * 4)


def test_a_mask_of_zeros_and_ones_is_refused_and_not_called_empty(tmp_path):
    path = save(tmp_path / "mask.png", np.eye(20, dtype=np.uint8))
    with pytest.raises(DataError, match=r"brightest pixel of the mask mask\.png is 1.*write 0 and 255"):
        read_mask(path, path, 8, "squash")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_measured_as_it_is_decoded(tmp_path, suffix, orientation):
    path, exif = tmp_path / f"photo.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path, exif=exif)
    assert image_size(path) == decode_image(path).shape[:2] == ((20, 40) if orientation < 5 else (40, 20))


def test_only_the_header_of_a_photograph_is_read(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert image_size(path) == (200, 300)
    with pytest.raises(ImageError):
        decode_image(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(30), b"\xff\xd8\xff"])
def test_what_is_no_photograph_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"^photo\.jpg can't be measured .*get the file again or remove it$"):
        image_size(path)
    with pytest.raises(ImageError, match=r"gone\.jpg can't be measured \(FileNotFoundError\)"):
        image_size(tmp_path / "gone.jpg")


def test_masks_are_found_in_the_data_sets_folder_or_where_one_says(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder of masks .*masks; it must hold <image id>\.png"):
        find_masks(tmp_path)
    (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match="holds no mask"):
        find_masks(tmp_path)
    for name in ("A.png", "B.b.png", ".hidden.png", "C.jpg"):
        (tmp_path / "masks" / name).write_bytes(b"")
    (tmp_path / "masks" / "folder.png").mkdir()
    assert find_masks(tmp_path) == {"A": tmp_path / "masks" / "A.png", "B.b": tmp_path / "masks" / "B.b.png"}
    save(tmp_path / "elsewhere" / "Z.png", np.eye(4, dtype=bool))
    assert list(find_masks(tmp_path, tmp_path / "elsewhere")) == ["Z"]


def test_the_drawn_sample_has_a_mask_of_every_image(tmp_path):
    root = make_synthetic(tmp_path, images=60, side=64)
    masks = find_masks(root)
    assert set(masks) == {path.stem for path in (root / "images").glob("*.png")}
    for path in list(masks.values())[::10]:
        assert 0.01 < read_mask(path, root / "images" / path.name, 64, "squash").mean() < 0.5


def test_the_masks_of_pad_ufes_20_fit_its_images(real_pad):
    if not (real_pad / "masks").is_dir():
        pytest.skip("there are no masks")
    photographs = {path.stem: path for path in (real_pad / "images").rglob("*.*")}
    masks = find_masks(real_pad)
    assert len(set(masks) & set(photographs)) > 0.9 * len(masks)
    contrasts = {"as it is": [], "mirrored": [], "upside down": []}
    for name in [name for name in masks if name in photographs][:100]:
        mask = read_mask(masks[name], photographs[name], 128, "squash")
        if mask is not None and 0.02 < mask.mean() < 0.3:
            seen = cv2.resize(decode_image(photographs[name]), (128, 128), interpolation=cv2.INTER_AREA).astype(float)
            for what, turned in zip(contrasts, (mask, mask[:, ::-1], mask[::-1]), strict=True):
                ring = cv2.dilate(turned.astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool) & ~turned
                contrasts[what].append(seen[ring].mean() - seen[turned].mean())
    # Lesions are darker than the skin around them, and less so where they are not.
    darker = {what: np.mean(values) for what, values in contrasts.items()}
    assert darker["as it is"] > 1.3 * max(darker["mirrored"], darker["upside down"]), darker
