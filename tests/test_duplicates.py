import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dualrefnet.analysis import duplicates
from dualrefnet.analysis.duplicates import (
    MAX_DISTANCE,
    Fingerprints,
    fingerprint,
    fingerprint_files,
    group_pairs,
    near_pairs,
)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.images import decode_image
from dualrefnet.data.synthetic import make_synthetic


def taken(images: list[np.ndarray]) -> Fingerprints:
    prints = [fingerprint(image) for image in images]
    hashes, small = np.stack([one[0] for one in prints]), np.stack([one[1] for one in prints])
    return Fingerprints(tuple(f"p{n}" for n in range(len(images))), hashes, small, ("",) * len(images), {})


def copied(image: np.ndarray, quality: int | None, scale: float) -> np.ndarray:
    image = Image.fromarray(image)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if quality is not None:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        image = Image.open(io.BytesIO(content.getvalue())).convert("RGB")
    return np.asarray(image)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Of 60 synthetic images of 192 px: the smallest that survive what is done to copies."""
    return load_dataset("sample", make_synthetic(tmp_path_factory.mktemp("copies") / "data", images=60)).with_image


@pytest.fixture(scope="module")
def images(table):
    return [decode_image(path) for path in table["image_path"][:40]]


def test_different_synthetic_lesions_are_no_near_duplicates(images):
    assert len(near_pairs(taken(images))) == 0


@pytest.mark.parametrize(("quality", "scale"), [(50, 1.0), (90, 1.0), (None, 0.4), (None, 1.7), (60, 0.7)])
def test_copies_are_found_and_nothing_else(images, quality, scale):
    pairs = near_pairs(taken([*images, *(copied(image, quality, scale) for image in images)]), workers=2)
    assert {(row.first, row.second) for row in pairs.itertuples()} == {(f"p{n}", f"p{n + 40}") for n in range(40)}
    assert not pairs["turned"].any()


def test_mirrored_and_turned_copies_are_found(images):
    turned = [np.ascontiguousarray(np.rot90(images[n][:, ::-1] if n % 2 else images[n], n % 4)) for n in range(8)]
    pairs = near_pairs(taken([*images, *turned]))
    assert {(row.first, row.second) for row in pairs.itertuples()} == {(f"p{n}", f"p{n + 40}") for n in range(8)}
    assert pairs.set_index("first")["turned"].to_dict() == {f"p{n}": n not in (0, 4) for n in range(8)}


def test_flat_images_are_like_nothing():
    grey = np.full((64, 64, 3), 128, dtype=np.uint8)
    assert len(near_pairs(taken([grey, grey + 1, grey]))) == 0


def test_the_blockwise_search_finds_what_a_plain_one_finds():
    generator = np.random.default_rng(0)
    bits = generator.random((90, 256)) < 0.5
    bits[30:60] = bits[:30] ^ (generator.random((30, 256)) < np.linspace(0.05, 0.35, 30)[:, None])
    hashes = np.stack([np.packbits(np.roll(bits, 7 * n, axis=1), axis=1).view(np.uint64) for n in range(8)], axis=1)
    small = np.repeat(generator.integers(256, size=(1, 32, 32), dtype=np.uint8), 90, axis=0)
    prints = Fingerprints(tuple(str(n) for n in range(90)), hashes, small, ("",) * 90, {})
    # With one image for all, upright pairs correlate perfectly, and turned ones don't.
    found = {(int(row.first), int(row.second)): row.distance for row in near_pairs(prints).itertuples()}
    plain = {(i, j): int((bits[i] != bits[j]).sum()) for i in range(90) for j in range(i + 1, 90)}
    expected = {pair: distance for pair, distance in plain.items() if distance <= MAX_DISTANCE}
    assert found == expected
    assert 5 < len(expected) < 30


def test_pairs_that_share_an_image_are_one_group():
    pairs = pd.DataFrame({"first": ["a", "c", "e", "b", "g"], "second": ["b", "d", "f", "c", "h"]})
    assert [sorted(group) for group in group_pairs(pairs)] == [["a", "b", "c", "d"], ["e", "f"], ["g", "h"]]
    assert group_pairs(pairs[:0]) == []


def test_a_smaller_copy_is_found_and_a_broken_file_left_out(table, tmp_path):
    table = table[:20]
    Image.fromarray(copied(decode_image(table["image_path"].iloc[3]), None, 0.7)).save(
        tmp_path / "copy.jpg", quality=80
    )
    (tmp_path / "broken.png").write_bytes(b"no image")
    extra = pd.DataFrame(
        {"image_id": ["copy", "broken"], "image_path": [str(tmp_path / "copy.jpg"), str(tmp_path / "broken.png")]}
    )
    table = pd.concat([table[["image_id", "image_path"]], extra], ignore_index=True)
    prints = fingerprint_files(table)
    assert list(prints.unreadable) == ["broken"]
    assert prints.hashes.shape == (21, 8, 4)
    assert [(row.first, row.second) for row in near_pairs(prints).itertuples()] == [(table["image_id"][3], "copy")]


def test_a_file_is_decoded_once_and_again_when_its_bytes_change(tmp_path, monkeypatch):
    table = pd.DataFrame({"image_id": ["a", "b"], "image_path": [str(tmp_path / "a.png"), str(tmp_path / "b.png")]})
    decoded = []
    monkeypatch.setattr(duplicates, "decode_image", lambda data: decoded.append(data) or decode_image(data))

    def write(name, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")

    write("a", 0)
    write("b", 1)
    first = fingerprint_files(table, cache=tmp_path)
    again = fingerprint_files(table, cache=tmp_path)
    assert len(decoded) == 2
    assert (again.hashes == first.hashes).all()
    assert (again.small == first.small).all()
    assert (again.image_ids, again.sha256) == (first.image_ids, first.sha256)
    write("b", 2)
    changed = fingerprint_files(table, cache=tmp_path)
    assert len(decoded) == 3
    assert (changed.hashes[0] == first.hashes[0]).all()
    assert (changed.hashes[1] != first.hashes[1]).any()
    (kept,) = (tmp_path / "fingerprints").iterdir()
    kept.write_bytes(b"damaged")
    assert (fingerprint_files(table, cache=tmp_path).hashes == changed.hashes).all()
    assert len(decoded) == 5
