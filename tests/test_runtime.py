"""What stands between a photograph with its form and the answer, and is copied into every bundle."""

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import dualrefnet
from dualrefnet import Predictor
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema, MetadataField, normalise
from dualrefnet.errors import DataError
from dualrefnet.recipe import ImageSection, MetadataSection
from dualrefnet.run import Run
from dualrefnet.runtime.classifier import Classifier, NetworkOutput
from dualrefnet.runtime.metadata import MetadataError, MetadataTransform
from dualrefnet.runtime.out_of_distribution import read_tensors
from dualrefnet.runtime.prediction import STEPS, occlude, saliency_map

PACKAGE = Path(dualrefnet.__file__).parent / "runtime"
SIDE = 32
SCHEMA = DatasetSchema(
    name="toy",
    title="Toy",
    classes=("A", "B", "C"),
    fields=(
        MetadataField(name="age", kind="numeric", unit="years", tier="M1", minimum=0, maximum=120),
        MetadataField(name="itch", kind="boolean"),
        MetadataField(
            name="site",
            kind="categorical",
            categories=("ARM", "LEG", "3"),
            aliases={"LIMB": "LEG"},
            missing_codes=("UNK",),
        ),
    ),
)


def encoder(**section: Any) -> MetadataEncoder:
    generator = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "age": generator.integers(20, 80, 60).astype(float),
            "itch": generator.choice(["True", "False"], 60),
            "site": generator.choice(["ARM", "LEG", "3", "UNK"], 60),
        }
    )
    return MetadataEncoder.fit(rows, SCHEMA, MetadataSection(**{"tier": "M3", "imputation": "zero", **section}))


def shipped(original: MetadataEncoder) -> MetadataTransform:
    return MetadataTransform.from_json(json.loads(json.dumps(original.to_json(), allow_nan=False)))


def classifier(network: Any, **parts: Any) -> Classifier:
    return Classifier(
        network,
        **{
            "classes": SCHEMA.classes,
            "malignant": ("C",),
            "encoder": shipped(encoder()),
            "image": ImageSection(size=SIDE),
            "reads_image": True,
            "reads_metadata": True,
            "learned_tokens": False,
            **parts,
        },
    )


def test_the_package_imports_numpy_opencv_onnxruntime_and_itself() -> None:
    allowed = {"numpy", "cv2", "onnxruntime"} | set(sys.stdlib_module_names)
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, file.name
                assert (PACKAGE / f"{node.module}.py").is_file(), f"{file.name}: {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                )
                assert {name.split(".")[0] for name in names} <= allowed, f"{file.name}: {names}"


def test_a_predictor_of_bundles_waits_for_no_torch() -> None:
    code = "import sys, dualrefnet.deploy.predictor; print([name for name in ('torch', 'pandas', 'pydantic') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


ANSWERS = st.fixed_dictionaries(
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
    st.lists(ANSWERS, min_size=1, max_size=4),
    st.sampled_from(["zero", "token"]),
    st.sampled_from(["level", "missing"]),
    st.sampled_from(["zscore", "raw"]),
    st.booleans(),
)
def test_a_form_is_read_as_a_row_of_the_table_and_as_the_shipped_encoder_reads_it(
    forms: list[dict[str, Any]], imputation: str, unknown: str, scale: str, merge: bool
) -> None:
    fitted = encoder(imputation=imputation, unknown=unknown, scale=scale, merge_aliases=merge)
    table = pd.DataFrame(
        [{field.name: form.get(field.name) for field in SCHEMA.fields} for form in forms], dtype=object
    )
    row = fitted.encode(table)
    assert not (row.rejected & ~row.missing).any()
    if row.rejected.any():
        # A table counts and names them; a single case is refused rather than answered as if the value were missing.
        with pytest.raises(MetadataError, match=r"is not one of its categories|must be a number"):
            shipped(fitted).encode_records(forms)
        return
    form = shipped(fitted).encode_records(forms)
    np.testing.assert_array_equal(row.values, form.values)
    np.testing.assert_array_equal(row.missing, form.missing)
    # A table that was normalised first, as training's is, says the same.
    ids = [str(number) for number in range(len(forms))]
    read, _ = normalise(table.assign(image_id=ids, image_path=None, label="A", patient_id="p", lesion_id="l"), SCHEMA)
    np.testing.assert_array_equal(fitted.encode(read).values, form.values)


def test_true_one_and_the_word_are_three_answers() -> None:
    observed = encoder().observe([None, None, [True, 1, 3, "3", 3.0]], 5)
    assert observed.rejected[:, 2].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("spelling", ["leg", " Leg ", "LEG", "limb", "LIMB ", "l e g"])
def test_a_category_is_known_whatever_its_case_and_spaces(spelling: str) -> None:
    form = shipped(encoder())
    np.testing.assert_array_equal(
        form.encode_records([{"site": spelling}]).values, form.encode_records([{"site": "LEG"}]).values
    )


def test_categories_that_differ_in_case_alone_stay_apart() -> None:
    schema = DatasetSchema(
        name="toy", title="Toy", classes=("A", "B"), fields=(MetadataField(name="gene", kind="categorical"),)
    )
    rows = pd.DataFrame({"gene": ["a", "A", "b"]})
    form = shipped(MetadataEncoder.fit(rows, schema, MetadataSection(tier="M2", imputation="zero")))
    one, other, third = form.encode_records([{"gene": "a"}, {"gene": "A"}, {"gene": "B"}]).values
    assert (one != other).any()
    assert third.sum() == 1
    with pytest.raises(MetadataError, match="gene"):
        form.encode_records([{"gene": " a.. "}])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"site": "moon base"}, r"site is not one of its categories \(ARM, LEG, 3, UNK\)"),
        ({"age": 300}, "age must be a number, from 0 to 120"),
        ({"age": float("inf")}, "age must be a number"),
        ({"itch": "perhaps"}, "itch is not one of its categories"),
    ],
)
def test_what_can_not_be_read_is_refused_without_repeating_it(form: dict[str, Any], said: str) -> None:
    with pytest.raises(MetadataError, match=said) as raised:
        shipped(encoder()).encode_records([form])
    assert not any(str(value) in str(raised.value) for value in form.values())


@pytest.mark.parametrize("age", ["patient 7", True, "1_000", [61], {"years": 61}])
def test_what_is_no_number_is_refused_without_repeating_it(age: Any) -> None:
    with pytest.raises(MetadataError, match=r"^age must be a number$"):
        shipped(encoder()).encode_records([{"age": age}])


def test_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([3, -1]), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "1"})
    read, header = read_tensors(tmp_path / "t.safetensors")
    assert header == {"format": "1"}
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.numpy())


@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_damaged_file_of_tensors_is_refused_or_read_and_nothing_else(place: int, junk: bytes) -> None:
    import tempfile

    from safetensors.torch import save

    data = bytearray(save({"a": torch.arange(6.0), "b": torch.tensor([3])}))
    place = min(place, len(data))
    data[place : place + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t"
        file.write_bytes(data[: len(data) - (place % 3)])
        try:
            read_tensors(file)
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def test_several_photographs_of_a_lesion_are_averaged_and_lesions_stay_apart() -> None:
    def brightness(images: Any, absent: Any, forms: Any) -> NetworkOutput:
        level = images.mean(axis=(1, 2, 3)) / 255
        return NetworkOutput(
            np.stack([np.log(level + 0.1), np.log(1.1 - level), np.full(len(level), -9.0)], axis=1), None
        )

    model = classifier(brightness)
    dark, bright = (np.full((SIDE, SIDE, 3), value, dtype=np.uint8) for value in (10, 240))
    alone = [model.classify([[picture]], [{}])[0] for picture in (dark, bright)]
    both, second, third = model.classify([[dark, bright], [bright], [dark]], [{}, {}, {"age": 61}])
    for label in SCHEMA.classes:
        assert both.probabilities[label] == pytest.approx(np.mean([one.probabilities[label] for one in alone]))
    assert second == alone[1]
    assert third.probabilities == alone[0].probabilities
    assert third.warnings != alone[0].warnings
    with pytest.raises(ValueError, match="needs a photograph"):
        model.classify([[]], [{}])
    with pytest.raises(ValueError, match="one form a lesion"):
        model.classify([[dark]], [])


def test_an_explanation_finds_the_place_and_the_answer_that_the_model_looks_at() -> None:
    def corner_and_itch(images: Any, absent: Any, forms: Any) -> NetworkOutput:
        red = images[:, : SIDE // 4, : SIDE // 4, 0].mean(axis=(1, 2)) / 255
        score = 2 * red + forms[:, names.index("itch_True")] - 1
        return NetworkOutput(np.stack([score, -score, np.full(len(score), -9.0)], axis=1), None)

    model = classifier(corner_and_itch)
    names = model.encoder.names
    picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    picture[: SIDE // 4, : SIDE // 4, 0] = 255
    found = model.explain_prepared(picture, {"itch": "yes", "age": 50, "site": None})
    assert found.label == "A"
    assert found.fields["itch"] > 0.1
    assert found.fields["age"] == pytest.approx(0, abs=1e-12)
    assert set(found.fields) == {"itch", "age"}, "what isn't answered can't be left out"
    assert found.saliency is not None
    assert found.saliency.shape == (SIDE, SIDE)
    assert np.unravel_index(found.saliency.argmax(), found.saliency.shape) < (SIDE // 4, SIDE // 4)
    assert np.abs(found.saliency[SIDE // 2 :, SIDE // 2 :]).max() < 0.01 < found.saliency.max()
    other = model.explain_prepared(picture, {"itch": "yes"}, "B")
    assert other.probability < 0.5
    assert other.fields["itch"] < 0
    with pytest.raises(ValueError, match="no class is called"):
        model.explain_prepared(picture, {}, "D")


@pytest.mark.parametrize("side", [32, 45, 192, 224])
def test_patches_cover_the_whole_picture(side: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    copies = occlude(picture)
    assert len(copies) == (STEPS - 1) ** 2
    changed = np.stack([(copy != picture).any(axis=2) for copy in copies])
    assert changed.any(axis=0).mean() > 0.99
    np.testing.assert_allclose(saliency_map(np.full(len(copies), 0.25), side), 0.25, rtol=1e-6)


def test_the_predictor_says_what_it_is(tiny_run: Run, sample_root: Path) -> None:
    predictor = Predictor.load(tiny_run)
    path = next((sample_root / "images").iterdir())
    assert predictor.name == tiny_run.recipe.name
    assert predictor.coverage == tiny_run.recipe.evaluation.coverage
    assert predictor.needs_image
    assert predictor.categories("itch")[:2] == ("False", "True")
    assert predictor.categories("age") == ()
    assert set(predictor.class_names) == set(predictor.classes)
    assert isinstance(json.dumps(predictor.description, allow_nan=False), str)
    again = predictor.predict_lesion([path, path], {"age": 61})
    assert again.probabilities == pytest.approx(predictor.predict(path, {"age": 61}).probabilities, abs=1e-5)
    explained = predictor.explain(path, {"age": 61, "itch": True})
    assert explained.label == predictor.predict(path, {"age": 61, "itch": True}).label
    without: Mapping[str, float] = predictor.predict(path, {"itch": True}).probabilities
    assert explained.fields["age"] == pytest.approx(explained.probability - without[explained.label], abs=1e-5)
    for wrong in ({"shoe": 1}, {"age": "old"}):
        with pytest.raises(DataError):
            predictor.check_metadata(wrong)
    with pytest.raises(DataError, match="no class"):
        predictor.explain(path, {}, "PSORIASIS")
