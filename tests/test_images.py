import contextlib
import io
import struct
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from dualrefnet.data.images import decode_image, find_masks, is_image, read_mask
from dualrefnet.errors import DataError, ImageError


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gradient(height=40, width=60):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=-1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


IMAGE = Image.fromarray(gradient())


FILES = {
    "jpeg": encoded(IMAGE, "JPEG", quality=95),
    "progressive": encoded(IMAGE, "JPEG", progressive=True),
    "png": encoded(IMAGE, "PNG"),
    "palette": encoded(IMAGE.convert("P"), "PNG", transparency=3),
    "bmp": encoded(IMAGE, "BMP"),
    "tiff": encoded(IMAGE, "TIFF"),
    "tiff_lzw": encoded(IMAGE, "TIFF", compression="tiff_lzw"),
    "webp": encoded(IMAGE, "WEBP", lossless=True),
    "grey16": encoded(Image.fromarray(gradient()[..., 0].astype(np.uint16) * 257), "PNG"),
}


def array_or_reason(data, **limits):
    try:
        return decode_image(data, **limits), ""
    except ImageError as error:
        return None, str(error)


def tiff_by_hand(bits, photometric, data, more_tags=()):
    """A TIFF of 16 x 16 pixels."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 16)]
    tags += [(279, len(data)), *more_tags]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    head, count = b"II*\0" + struct.pack("<I", 8 + len(data)), struct.pack("<H", len(tags))
    return head + data + count + entries + struct.pack("<I", 0)


def png_by_hand(width, height):
    """A PNG that promises a size and holds no pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels_back(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    array = decode_image(encoded(IMAGE, kind, **options))
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    assert array.flags.writeable
    np.testing.assert_array_equal(array, gradient())


def test_the_type_is_that_of_the_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(FILES["png"])
    np.testing.assert_array_equal(decode_image(tmp_path / "a.jpg"), gradient())
    (tmp_path / "notes.jpg").write_text("patient 7 was here\n" * 100)
    with pytest.raises(ImageError, match=r"notes\.jpg isn't a JPEG") as caught:
        decode_image(tmp_path / "notes.jpg")
    assert "patient 7" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(50), encoded(IMAGE, "GIF"), encoded(IMAGE, "PPM"), b"%!PS-Adobe-3.0 EPSF-3.0"]
)
def test_other_formats_are_refused(data):
    with pytest.raises(ImageError, match="isn't a JPEG"):
        decode_image(data)


def test_images_of_phones_are_read_or_it_is_said_what_to_install(monkeypatch):
    if features.check("avif"):
        assert np.abs(decode_image(encoded(IMAGE, "AVIF", quality=100)).astype(int) - gradient()).mean() < 3
    with contextlib.suppress(ImportError):
        import pillow_heif

        heic = io.BytesIO()
        pillow_heif.from_pillow(IMAGE).save(heic, quality=100)
        assert np.abs(decode_image(heic.getvalue()).astype(int) - gradient()).mean() < 3
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    monkeypatch.setitem(sys.modules, "PIL.AvifImagePlugin", None)
    for brand, needed in ((b"heic", "pip install pillow-heif"), (b"mif1", "pillow-heif"), (b"avif", "pillow>=11.3")):
        with pytest.raises(ImageError, match=needed):
            decode_image(b"\0\0\0\x18ftyp" + brand + bytes(50))


def test_what_is_listed_as_an_image(tmp_path):
    contents = {
        "a.JPG": b"",
        "b.jfif": b"",
        "c.heic": b"",
        "ISIC_1": FILES["jpeg"],
        "README": b"text",
        "d.txt": b"BMI,age",
    }
    contents |= {
        "e.jpg_large": FILES["png"],
        "f.bak": b"\0\0\0\x18ftypheic",
        "g.mp4": b"\0\0\0\x18ftypisom",
        "h": FILES["bmp"],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert [name for name in contents if is_image(tmp_path / name)] == [
        *("a.JPG", "b.jfif", "c.heic", "ISIC_1", "e.jpg_large", "f.bak", "h")
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA"])
def test_grey_and_palette_modes_become_rgb(mode):
    source = IMAGE.convert("L").convert(mode) if mode != "PA" else IMAGE.convert("L").convert("LA").convert("PA")
    kind = "TIFF" if mode == "PA" else "PNG"
    array = decode_image(encoded(source, kind))
    np.testing.assert_array_equal(array, np.asarray(source.convert("RGB")))


def test_cmyk_jpegs_keep_their_colours():
    cmyk = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    data = encoded(cmyk, "JPEG", quality=100)
    assert b"Adobe" in data
    array = decode_image(data).reshape(-1, 3)
    assert (array[:, 0] > 245).all()
    assert (array[:, 1:] < 10).all()
    np.testing.assert_array_equal(decode_image(encoded(cmyk, "TIFF")), np.full((32, 32, 3), (255, 0, 0)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_lie_on_white(kind):
    layers = np.zeros((20, 30, 4), np.uint8)
    layers[:, :10] = (10, 20, 30, 255)
    layers[:, 10:20] = (0, 0, 0, 128)
    layers[:, 20:] = (200, 0, 0, 0)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    array = decode_image(encoded(Image.fromarray(layers), kind, **options))
    assert (array[:, :10] == (10, 20, 30)).all()
    assert (abs(array[:, 10:20].astype(int) - 127) <= 1).all()
    assert (array[:, 20:] == 255).all()


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    wanted = (values.astype(float) / 257).round().astype(np.uint8)
    for pixels, kind in ((values, "PNG"), (values, "TIFF"), (values.astype(">u2"), "TIFF")):
        array = decode_image(encoded(Image.fromarray(pixels), kind))
        np.testing.assert_array_equal(array, np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    # What the sensor saw for each orientation, so that every file shows the same upright image.
    upright = np.kron(gradient(4, 6), np.ones((16, 16, 1), np.uint8))
    sensor = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    array = decode_image(encoded(Image.fromarray(np.ascontiguousarray(sensor)), kind, exif=exif, **options))
    assert array.shape == upright.shape
    assert np.abs(array.astype(int) - upright).mean() < 2


def test_damaged_exif_is_ignored_without_a_warning():
    exif = Image.Exif()
    exif[0x010F] = "a camera whose name is long enough to stand apart"
    data = encoded(IMAGE, "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    entry = start + 10
    offset = struct.pack(">I" if data[start : start + 2] == b"MM" else "<I", 2**31 - 1)
    damaged = data[: entry + 8] + offset + data[entry + 12 :]
    np.testing.assert_array_equal(decode_image(damaged), decode_image(data))
    np.testing.assert_array_equal(decode_image(data[:start] + b"rubbish!" + data[start + 8 :]), decode_image(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_first_image_of_several_is_taken(kind):
    pages = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    array = decode_image(encoded(pages[0], kind, save_all=True, append_images=pages[1:], **options))
    assert (array == (255, 0, 0)).all()


def test_decompression_bombs_are_refused_by_their_header():
    for side in (30_000, 2**31 - 1):
        with pytest.raises(ImageError, match=r"limit|damaged"):
            decode_image(png_by_hand(side, side))
    with pytest.raises(ImageError, match=r"60 x 40 pixels; the limit is 2,000"):
        decode_image(FILES["png"], max_pixels=2000)
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (15999).to_bytes(3, "little") * 2
    with pytest.raises(ImageError):
        decode_image(b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x)


def test_a_tiff_with_tiles_beyond_the_limit_is_refused():
    data = tiff_by_hand(8, 1, bytes(256), more_tags=[(322, 60_000), (323, 60_000)])
    with pytest.raises(ImageError, match="tiles of 3,600,000,000 pixels"):
        decode_image(data)


def test_limits_of_bytes_and_sides(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(FILES["png"])
    assert decode_image(path, max_bytes=len(FILES["png"])).shape == (40, 60, 3)
    for source in (path, FILES["png"]):
        with pytest.raises(ImageError, match="larger than"):
            decode_image(source, max_bytes=len(FILES["png"]) - 1)
    with pytest.raises(ImageError, match="shorter than 41"):
        decode_image(path, min_side=41)
    assert decode_image(encoded(Image.new("RGB", (1, 1)), "PNG"), min_side=1).shape == (1, 1, 3)


@settings(max_examples=150)
@given(kind=st.sampled_from(sorted(FILES)), cut=st.floats(0, 1))
def test_a_cut_file_is_refused_or_gives_the_whole_image(kind, cut):
    whole = decode_image(FILES[kind])
    array, reason = array_or_reason(FILES[kind][: int(len(FILES[kind]) * cut)])
    if array is None:
        assert len(reason.splitlines()) == 1
    else:
        np.testing.assert_array_equal(array, whole)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_ends_early_is_refused_though_it_has_an_end_marker(mode, options):
    noise = np.random.default_rng(0).integers(0, 255, (160, 200, 3), np.uint8)
    whole = encoded(Image.fromarray(noise).convert(mode), "JPEG", **options)
    assert decode_image(whole).shape == (160, 200, 3)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match="damaged or truncated"):
            decode_image(whole[: int(share * len(whole))] + b"\xff\xd9")
    middle = len(whole) // 2
    if "progressive" not in options:
        with pytest.raises(ImageError, match="damaged or truncated"):
            decode_image(whole[:middle] + whole[middle + len(whole) // 10 :])
    # What a decoder fills up with is a colour that an image may have.
    for colour in (0, 128, 255):
        plain = encoded(Image.new("RGB", (64, 50), (colour,) * 3).convert(mode), "JPEG", **options)
        assert np.ptp(decode_image(plain)) == 0


@pytest.mark.parametrize("kind", ["BMP", "WEBP", "PNG", "TIFF"])
def test_a_file_without_its_last_bytes_is_refused(kind):
    whole = encoded(IMAGE, kind)
    for length in (len(whole) // 3, len(whole) - 20):
        with pytest.raises(ImageError, match="damaged or truncated"):
            decode_image(whole[:length])
    with pytest.raises(ImageError, match="damaged or truncated"):
        decode_image(whole[: len(whole) // 2] + whole[len(whole) // 2 + 50 :])


@settings(max_examples=250)
@given(data=st.data())
def test_damaged_bytes_give_an_array_or_an_image_error_and_nothing_else(data):
    file = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 6))):
        # Headers are where the interesting damage is.
        last = data.draw(st.sampled_from([40, 200, len(file) - 1]))
        place = data.draw(st.integers(0, min(last, len(file) - 1)))
        file[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    array, reason = array_or_reason(bytes(file), max_pixels=1_000_000)
    if array is None:
        assert len(reason.splitlines()) == 1
    else:
        assert (array.dtype, array.ndim, array.shape[2]) == (np.uint8, 3, 3)
        assert array.shape[0] * array.shape[1] <= 1_000_000


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_a_mask_of_known_pixels_is_squashed_and_cropped(tmp_path):
    # A image of 40 x 80: its left half is lesion.
    image = save(tmp_path / "A.png", np.zeros((40, 80, 3), np.uint8))
    left = np.zeros((10, 10), bool)
    left[:, :5] = True
    path = save(tmp_path / "mask.png", left)
    np.testing.assert_array_equal(read_mask(path, image, 4, "squash"), [[True, True, False, False]] * 4)
    # Cropped to the columns 20..60, it is still the left half: 20..40. Of a lesion in the columns 0..16 nothing is
    # left.
    np.testing.assert_array_equal(read_mask(path, image, 4, "crop"), [[True, True, False, False]] * 4)
    left[:, 2:] = False
    assert read_mask(save(tmp_path / "mask.png", left), image, 4, "crop") is None
    assert read_mask(path, image, 10, "squash").sum() == 20
    # In the columns 48..64, of which 48..60 are seen: the last 3 tenths.
    right = np.zeros((10, 10), bool)
    right[:, 6:8] = True
    cropped = read_mask(save(tmp_path / "mask.png", right), image, 20, "crop")
    np.testing.assert_array_equal(cropped[0], [False] * 14 + [True] * 6)


def test_a_mask_of_zeros_and_ones_is_refused_and_not_called_empty(tmp_path):
    path = save(tmp_path / "mask.png", np.eye(20, dtype=np.uint8))
    with pytest.raises(DataError, match=r"brightest pixel of the mask mask\.png is 1.*write 0 and 255"):
        read_mask(path, path, 8, "squash")


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


def test_the_masks_of_pad_ufes_20_fit_its_images(real_pad):
    if not (real_pad / "masks").is_dir():
        pytest.skip("there are no masks")
    images = {path.stem: path for path in (real_pad / "images").rglob("*.*")}
    masks = find_masks(real_pad)
    assert len(set(masks) & set(images)) > 0.9 * len(masks)
    contrasts = {"as it is": [], "mirrored": [], "upside down": []}
    for name in [name for name in masks if name in images][:100]:
        mask = read_mask(masks[name], images[name], 128, "squash")
        if mask is not None and 0.02 < mask.mean() < 0.3:
            seen = cv2.resize(decode_image(images[name]), (128, 128), interpolation=cv2.INTER_AREA).astype(float)
            for what, turned in zip(contrasts, (mask, mask[:, ::-1], mask[::-1]), strict=True):
                ring = cv2.dilate(turned.astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool) & ~turned
                contrasts[what].append(seen[ring].mean() - seen[turned].mean())
    # Lesions are darker than the skin around them, and less so where they are not.
    darker = {what: np.mean(values) for what, values in contrasts.items()}
    assert darker["as it is"] > 1.3 * max(darker["mirrored"], darker["upside down"]), darker
