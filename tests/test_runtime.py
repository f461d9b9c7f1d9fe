"""The core that every bundle carries: metadata, classifier, explanation, tensors."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import dualrefnet
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema, MetadataField, normalise
from dualrefnet.recipe import ImageSection, MetadataSection
from dualrefnet.runtime.classifier import Classifier, NetworkOutput
from dualrefnet.runtime.metadata import MetadataError, MetadataTransform
from dualrefnet.runtime.out_of_distribution import read_tensors

PACKAGE = Path(dualrefnet.__file__).parent / "runtime"
SIDE = 32
AGE = MetadataField(name="age", kind="numeric", unit="years", tier="M1", minimum=0, maximum=120)
SITE = {"categories": ("ARM", "LEG", "3"), "aliases": {"LIMB": "LEG"}, "missing_codes": ("UNK",)}
FIELDS = (AGE, MetadataField(name="itch", kind="boolean"), MetadataField(name="site", kind="categorical", **SITE))
SCHEMA = DatasetSchema(name="toy", title="Toy", classes=("A", "B", "C"), fields=FIELDS)


def fitted(**section: Any) -> MetadataEncoder:
    random = np.random.default_rng(0)
    columns = {
        "age": random.integers(20, 80, 60).astype(float),
        "itch": random.choice(["True", "False"], 60),
        "site": random.choice(["ARM", "LEG", "3", "UNK"], 60),
    }
    settings = MetadataSection(**{"tier": "M3", "imputation": "zero", **section})
    return MetadataEncoder.fit(pd.DataFrame(columns), SCHEMA, settings)


def shipped(original: MetadataEncoder) -> MetadataTransform:
    return MetadataTransform.from_json(json.loads(json.dumps(original.to_json(), allow_nan=False)))


def classifier(network: Any) -> Classifier:
    reads = {"reads_image": True, "reads_metadata": True, "learned_tokens": False}
    return Classifier(network, SCHEMA.classes, ("C",), shipped(fitted()), ImageSection(size=SIDE), **reads)


def test_the_package_imports_numpy_opencv_onnxruntime_and_itself() -> None:
    allowed = {"numpy", "cv2", "PIL", "onnxruntime"} | set(sys.stdlib_module_names)
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, file.name
                assert (PACKAGE / f"{node.module}.py").is_file(), f"{file.name}: {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                assert {name.split(".")[0] for name in names} <= allowed, f"{file.name}: {names}"


def test_a_predictor_of_bundles_waits_for_no_torch() -> None:
    code = (
        "import sys, dualrefnet.deploy.predictor; assert not {'torch', 'pandas', 'pydantic', 'onnx'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "age": st.none() | st.integers(-5, 200) | st.floats() | st.sampled_from(["61", " 7 ", "", "nan", "1e2"]),
        "itch": st.none() | st.booleans() | st.sampled_from(["yes", "No", 1, 0.0, "perhaps", ""]),
        "site": st.none()
        | st.sampled_from(["ARM", "LIMB", "UNK", 3, 3.0, "3.0", True, " LEG ", "MOON", ""])
        | st.text(max_size=5),
    },
)


@given(
    st.lists(RECORDS, min_size=1, max_size=4),
    st.sampled_from(["zero", "token"]),
    st.sampled_from(["level", "missing"]),
    st.sampled_from(["zscore", "raw"]),
    st.booleans(),
)
def test_a_record_is_encoded_as_a_row_of_the_table_and_as_the_shipped_encoder_does(
    records: list[dict[str, Any]], imputation: str, unknown: str, scale: str, merge: bool
) -> None:
    encoder = fitted(imputation=imputation, unknown=unknown, scale=scale, merge_aliases=merge)
    rows = [{field.name: record.get(field.name) for field in SCHEMA.fields} for record in records]
    table = pd.DataFrame(rows, dtype=object)
    row = encoder.encode(table)
    assert not (row.invalid & ~row.missing).any()
    if row.invalid.any():
        # A table counts them; a single record is refused rather than predicted as if the value were missing.
        with pytest.raises(MetadataError, match=r"is not one of its categories|must be a number"):
            shipped(encoder).encode_records(records)
        return
    encoded = shipped(encoder).encode_records(records)
    np.testing.assert_array_equal(row.values, encoded.values)
    np.testing.assert_array_equal(row.missing, encoded.missing)
    # A table that was normalised first, as training's is, gives the same.
    ids = [str(number) for number in range(len(records))]
    read, _ = normalise(table.assign(image_id=ids, image_path=None, label="A", patient_id="p", lesion_id="l"), SCHEMA)
    np.testing.assert_array_equal(encoder.encode(read).values, encoded.values)


def test_true_one_and_the_word_are_three_values() -> None:
    observed = fitted().observe([None, None, [True, 1, 3, "3", 3.0]], 5)
    assert observed.rejected[:, 2].tolist() == [True, True, False, False, False]


def test_a_category_is_known_whatever_its_case_and_spaces_unless_these_tell_two_apart() -> None:
    encoder = shipped(fitted())
    leg = encoder.encode_records([{"site": "LEG"}]).values
    for spelling in ("leg", " Leg ", "limb", "LIMB ", "l e g"):
        np.testing.assert_array_equal(encoder.encode_records([{"site": spelling}]).values, leg)
    gene = MetadataField(name="gene", kind="categorical")
    schema = DatasetSchema(name="toy", title="Toy", classes=("A", "B"), fields=(gene,))
    rows, settings = pd.DataFrame({"gene": ["a", "A", "b"]}), MetadataSection(tier="M2", imputation="zero")
    encoder = shipped(MetadataEncoder.fit(rows, schema, settings))
    one, other, third = encoder.encode_records([{"gene": "a"}, {"gene": "A"}, {"gene": "B"}]).values
    assert (one != other).any()
    assert third.sum() == 1
    with pytest.raises(MetadataError, match="gene"):
        encoder.encode_records([{"gene": " a.. "}])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"site": "moon base"}, r"site is not one of its categories \(ARM, LEG, 3, UNK\)"),
        ({"age": 300}, "age must be a number, at least 0 and at most 120"),
        ({"age": float("inf")}, "age must be a number"),
        ({"itch": "perhaps"}, "itch is not one of its categories"),
        *(({"age": age}, r"^age must be a number$") for age in ("patient 7", True, "1_000", [61], {"years": 61})),
    ],
)
def test_an_invalid_value_is_refused_without_repeating_it(record: dict[str, Any], words: str) -> None:
    with pytest.raises(MetadataError, match=words) as raised:
        shipped(fitted()).encode_records([record])
    assert not any(str(value) in str(raised.value) for value in record.values())


@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_damaged_file_of_tensors_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes
) -> None:
    data = bytearray(save({"a": torch.arange(6.0), "b": torch.tensor([3])}))
    place = min(place, len(data))
    data[place : place + len(junk)] = junk
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(data[: len(data) - (place % 3)])
    try:
        read_tensors(file)
    except (ValueError, KeyError, TypeError, AttributeError):
        return


def test_several_images_of_a_lesion_are_averaged_and_lesions_stay_separate() -> None:
    def brightness(images: Any, missing: Any, metadata: Any) -> NetworkOutput:
        mean = images.mean(axis=(1, 2, 3)) / 255
        return NetworkOutput(np.stack([np.log(mean + 0.1), np.log(1.1 - mean), np.full(len(mean), -9.0)], axis=1), None)

    model = classifier(brightness)
    dark, bright = (np.full((SIDE, SIDE, 3), value, dtype=np.uint8) for value in (10, 240))
    alone = [model.classify([[image]], [{}])[0] for image in (dark, bright)]
    both, second, third = model.classify([[dark, bright], [bright], [dark]], [{}, {}, {"age": 61}])
    for label in SCHEMA.classes:
        assert both.probabilities[label] == pytest.approx(np.mean([one.probabilities[label] for one in alone]))
    assert second == alone[1]
    assert third.probabilities == alone[0].probabilities
    assert third.warnings != alone[0].warnings
    with pytest.raises(ValueError, match="needs an image"):
        model.classify([[]], [{}])
    with pytest.raises(ValueError, match="give each lesion one"):
        model.classify([[dark]], [])


def test_an_explanation_finds_the_region_and_the_value_that_the_model_uses() -> None:
    def corner_and_itch(images: Any, missing: Any, metadata: Any) -> NetworkOutput:
        red = images[:, : SIDE // 4, : SIDE // 4, 0].mean(axis=(1, 2)) / 255
        score = 2 * red + metadata[:, model.encoder.names.index("itch_True")] - 1
        return NetworkOutput(np.stack([score, -score, np.full(len(score), -9.0)], axis=1), None)

    model = classifier(corner_and_itch)
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    image[: SIDE // 4, : SIDE // 4, 0] = 255
    found = model.explain_prepared(image, {"itch": "yes", "age": 50, "site": None})
    assert found.label == "A"
    assert found.fields["itch"] > 0.1
    assert found.fields["age"] == pytest.approx(0, abs=1e-12)
    assert set(found.fields) == {"itch", "age"}, "a missing value can't be left out"
    saliency = found.saliency
    assert saliency is not None
    assert saliency.shape == (SIDE, SIDE)
    assert np.unravel_index(saliency.argmax(), saliency.shape) < (SIDE // 4, SIDE // 4)
    assert np.abs(saliency[SIDE // 2 :, SIDE // 2 :]).max() < 0.01 < saliency.max()
    other = model.explain_prepared(image, {"itch": "yes"}, "B")
    assert other.probability < 0.5
    assert other.fields["itch"] < 0
    with pytest.raises(ValueError, match="no class is called"):
        model.explain_prepared(image, {}, "D")
