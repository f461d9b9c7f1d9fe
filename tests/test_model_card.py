import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

import dualrefnet
from dualrefnet.data.isic_2019 import SCHEMA as ISIC
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.pad_ufes_20 import SCHEMA as PAD
from dualrefnet.deploy.card import data_licence, model_card
from dualrefnet.deploy.export import metadata_schema
from dualrefnet.run import Run

FILES = ("bundle.json", "model.onnx", "runtime/")


def bundle_of(run: Run, **changes: Any) -> dict[str, Any]:
    """What the export would write, of a network that was never made."""
    description = run.model
    network = {
        "bytes": 2_000_000,
        "parity": {
            "cases": 17,
            "max_probability_difference": 2e-6,
            "limit": 1e-3,
            "checked_on": "on validation cases of the run",
        },
        "inputs": [{"name": "image", "type": "uint8", "shape": "(N, 32, 32, 3)", "meaning": "the photograph"}],
        "outputs": [{"name": "logits", "type": "float32", "shape": "(N, 6)", "meaning": "in the order of `classes`"}],
    }
    made = {
        "dataset": {**description["dataset"], "citation": "Somebody, 2020"},
        "method": run.recipe.model.method,
        "classes": description["classes"],
        "class_names": {"MEL": "melanoma"},
        "malignant": description["malignant"],
        "metadata": description["metadata"],
        "reads_image": True,
        "learned_tokens": False,
        "networks": {"float32": network},
        "no_int8": "it wasn't asked for",
        "missingness_shortcut": None,
        "exported_with": {"dualrefnet": dualrefnet.__version__, "onnxruntime": "1.99"},
    }
    return {**made, **changes}


def flat(card: str) -> str:
    return " ".join(card.split())


def test_the_card_tells_what_the_model_is_and_is_worth(tiny_run: Run) -> None:
    card = model_card(bundle_of(tiny_run), tiny_run, FILES)
    metrics, text = tiny_run.metrics, flat(card)
    assert text.index("Not a medical device") < text.index("How to use it")
    assert "MEL (melanoma)" in text
    assert "Malignant among them: BCC, MEL, SCC." in text
    low, high = metrics["balanced_accuracy_ci95"]
    assert f"| balanced accuracy | {metrics['balanced_accuracy']:.3f} | [{low:.3f}, {high:.3f}] |" in text
    melanoma = metrics["per_class"]["MEL"]
    assert f"| MEL | {melanoma['support']} | {melanoma['sensitivity']:.3f} [" in text
    assert f"{metrics['support']} images, protocol `grouped`. **Drawn pictures, not clinical" in text
    assert "those lesions are benign: a part of the score can come from the gaps alone" in text
    assert f"Temperature {metrics['calibrated']['temperature']:.2f}" in text
    assert (
        f"({metrics['calibrated']['referral']['missed']} of {metrics['calibrated']['referral']['malignant']} missed)"
        in text
    )
    assert "Not measured by subgroup" in text
    assert "to 2e-06 at most (17 answers, on validation cases" in text
    assert "No int8 file: it wasn't asked for." in text
    assert 'predict("photograph.jpg", {"age": ' in text
    assert 'python -m runtime photograph.jpg --form \'{"age": ' in text
    assert "| in | `image` | uint8 | (N, 32, 32, 3) |" in text
    assert "| `model.onnx` |" in text
    assert "| `model.int8.onnx` |" not in text
    assert f"commit {tiny_run.fingerprint['git_commit'] or 'not known'}" in text
    assert "onnxruntime 1.99" in text
    assert str(tiny_run.path) not in card
    for block in card.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_the_hub_can_read_the_header(tiny_run: Run) -> None:
    card = model_card(bundle_of(tiny_run), tiny_run, FILES)
    header = ModelCard(card).data
    assert (header.license, header.library_name, header.pipeline_tag) == (
        "apache-2.0",
        "dualrefnet",
        "image-classification",
    )
    assert {"multimodal", "drawn-pictures-not-clinical", "research-only"} <= set(header.tags)
    unknown = {**tiny_run.model["dataset"], "citation": "", "licence": "", "drawn": False}
    header = yaml.safe_load(model_card(bundle_of(tiny_run, dataset=unknown), tiny_run, FILES).split("---")[1])
    assert (header["license"], header["license_link"]) == ("other", "DATA_LICENCE.md")
    assert "drawn-pictures-not-clinical" not in header["tags"]


def test_a_model_without_photograph_or_without_form_is_described_as_one(tiny_run: Run) -> None:
    form = flat(model_card(bundle_of(tiny_run, reads_image=False, method="metadata_only"), tiny_run, FILES))
    assert "answers alone, no photograph" in form
    assert "python -m runtime --form" in form
    assert "--csv forms.csv" in form
    image = flat(model_card(bundle_of(tiny_run, method="no_metadata"), tiny_run, FILES))
    assert "It reads a photograph of a skin lesion, and gives" in image
    assert "Questions of the form" not in image
    assert "without the photograph too" in flat(model_card(bundle_of(tiny_run, learned_tokens=True), tiny_run, FILES))


def test_int8_is_set_beside_float32(tiny_run: Run) -> None:
    bundle = bundle_of(tiny_run)
    bundle["networks"]["int8"] = {
        "bytes": 500_000,
        "calibrated_on": 72,
        "verdict": "not faster on this machine. Use model.onnx.",
        "measured": {
            "cases": 24,
            "float32": {"accuracy": 0.75, "balanced_accuracy": 0.7, "false_alarms": 0.02},
            "int8": {"accuracy": 0.5, "balanced_accuracy": 0.45, "false_alarms": 0.04},
            "same_label": 0.875,
            "max_probability_difference": 0.25,
            "mean_probability_difference": 0.012,
            "speed": [{"batch": 1, "float32_ms": 4.0, "int8_ms": 5.0, "times_as_fast": 0.8}],
            "processor": "a processor, without VNNI",
        },
    }
    text = flat(model_card(bundle, tiny_run, FILES))
    for row in (
        *(
            "| accuracy | 0.750 | 0.500 |",
            "| balanced accuracy | 0.700 | 0.450 |",
            "| share warned of as no lesion | 0.020 | 0.040 |",
        ),
        *("| milliseconds for 1 | 4.0 | 5.0 (0.80 times as fast) |", "| megabytes | 2.0 | 0.5 |"),
    ):
        assert row in text
    assert "not faster on this machine. Use model.onnx." in text
    assert "The same class for 87.5% of the images; probabilities differ by 0.012 on average and 0.25 at most" in text
    assert "from 72 training images" in text


def test_subgroups_are_told_where_they_were_measured(tiny_run: Run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.path, tmp_path / "run")
    (tmp_path / "run" / "probes").mkdir()
    rows = [
        ("gender", "FEMALE", 30, True, "accuracy", 0.8, 0.7, 0.9),
        ("gender", "FEMALE", 30, True, "balanced_accuracy", 0.6, 0.5, 0.7),
        ("region", "A|B", 25, True, "accuracy", 0.5, None, None),
        ("fitspatrick", "6", 1, False, None, None, None, None),
    ]
    names = ["field", "level", "images", "measured", "measure", "value", "low", "high"]
    pd.DataFrame(rows, columns=names).to_csv(tmp_path / "run" / "probes" / "subgroups.csv", index=False)
    text = flat(model_card(bundle_of(tiny_run), Run(tmp_path / "run"), FILES))
    assert "| gender | FEMALE | 30 | 0.800 [0.70, 0.90] |" in text
    assert "| region | A\\|B | 25 | 0.500 |" in text
    assert "0.600" not in text.split("For whom")[1].split("The files compared")[0]
    assert "nothing is known (images in brackets): fitspatrick 6 (1)." in text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (PAD, ("CC BY 4.0", "also commercially, if you name their authors", "doi:10.17632/zr7vgbcyr2.1")),
        (ISIC, ("CC BY-NC 4.0", "**not commercially**", "assume that it may not", "HAM10000")),
    ],
)
def test_the_licence_of_the_data_and_what_follows_from_it_are_said(schema: Any, words: tuple[str, ...]) -> None:
    text = data_licence({"title": schema.title, "licence": schema.licence, "citation": schema.citation})
    assert schema.title in text
    assert all(word in flat(text) for word in words)


def test_a_licence_that_nobody_stated_is_not_made_up() -> None:
    text = flat(data_licence({"title": "Own data", "licence": "", "citation": ""}))
    assert "Licence: not stated" in text
    assert "To cite: not stated" in text
    assert "Ask them before you pass the model on" in text
    assert "Read its terms" in data_licence({"title": "Own data", "licence": "ODbL 1.0", "citation": "me"})


@pytest.fixture(scope="module")
def schema(tiny_run: Run) -> dict[str, Any]:
    made = metadata_schema(MetadataEncoder.from_json(tiny_run.model["metadata"]), "sample")
    jsonschema.Draft202012Validator.check_schema(made)
    return json.loads(json.dumps(made, allow_nan=False))


@pytest.mark.parametrize(
    ("form", "valid"),
    [
        ({}, True),
        ({"age": 61, "region": "FACE", "itch": True, "grew": "UNK", "fitspatrick": 2}, True),
        ({"age": 0, "fitspatrick": "2", "background_father": "BRASIL", "smoke": None, "diameter_1": 4.5}, True),
        ({"age": None}, True),
        ({"age": 121}, False),
        ({"age": -1}, False),
        ({"age": "old"}, False),
        ({"region": "MOON"}, False),
        ({"smoke": "UNK"}, False),
        ({"smoke": "perhaps"}, False),
        ({"fitspatrick": 7}, False),
        ({"shoe_size": 43}, False),
        ([], False),
    ],
)
def test_the_schema_tells_a_form_from_what_is_none(schema: dict[str, Any], form: Any, valid: bool) -> None:
    assert jsonschema.Draft202012Validator(schema).is_valid(form) is valid


def test_the_schema_says_what_is_asked_and_in_which_unit(schema: dict[str, Any]) -> None:
    assert list(schema["properties"]) == [field.name for field in PAD.fields]
    assert schema["additionalProperties"] is False
    assert "required" not in schema
    age = schema["properties"]["age"]
    assert (age["unit"], age["description"]) == ("years", "Age of the patient, in years")
    assert age["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 120}
    assert schema["properties"]["itch"]["description"] == "Does it itch?"
