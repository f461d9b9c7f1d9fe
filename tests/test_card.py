import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import dualrefnet
from dualrefnet.data.isic_2019 import SCHEMA as ISIC
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.pad_ufes_20 import SCHEMA as PAD
from dualrefnet.data.schema import unnamed_patients
from dualrefnet.deploy.card import data_licence, model_card
from dualrefnet.deploy.export import metadata_schema
from dualrefnet.display.format import protocol_name, sentence
from dualrefnet.files import write_json
from dualrefnet.report.provenance import run_notes, run_title
from dualrefnet.run import Run

FILES = ("bundle.json", "model.onnx", "runtime/")
PARITY = {"cases": 17, "max_probability_difference": 2e-6, "limit": 1e-3, "checked_on": "on validation cases"}
INT8 = {
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


def card(run: Run, int8: bool = False, **changes: Any) -> str:
    """The card of a network that was never made."""
    about = run.model
    network = {
        "bytes": 2_000_000,
        "parity": PARITY,
        "inputs": [{"name": "image", "type": "uint8", "shape": "(N, 32, 32, 3)", "meaning": "RGB"}],
        "outputs": [{"name": "logits", "type": "float32", "shape": "(N, 6)", "meaning": "in the order of `classes`"}],
    }
    bundle = {
        "dataset": {**about["dataset"], "citation": "Somebody, 2020"},
        "method": run.recipe.model.method,
        **{name: about[name] for name in ("classes", "malignant", "metadata")},
        "class_names": {"MEL": "melanoma"},
        "reads_image": True,
        "learned_tokens": False,
        "networks": {"float32": network, **({"int8": INT8} if int8 else {})},
        "no_int8": "it wasn't asked for",
        "missingness_shortcut": None,
        "exported_with": {"dualrefnet": dualrefnet.__version__, "onnxruntime": "1.99"},
    }
    return model_card({**bundle, **changes}, run, FILES)


def test_the_card_has_the_measures_and_runs(tiny_run: Run) -> None:
    text, metrics = card(tiny_run), tiny_run.metrics
    assert text.index("Not a medical device") < text.index("## How to use")
    low, high = metrics["balanced_accuracy_ci95"]
    melanoma, referral = metrics["per_class"]["MEL"], metrics["calibrated"]["referral"]
    for part in (
        "BCC, MEL (melanoma), NEV",
        "Malignant among them: BCC, MEL, SCC.",
        f"| balanced accuracy | {metrics['balanced_accuracy']:.3f} | [{low:.3f}, {high:.3f}] |",
        f"| MEL | {melanoma['support']} | {melanoma['sensitivity']:.3f} [",
        f"Temperature {metrics['calibrated']['temperature']:.2f}",
        f"({referral['missed']} of {referral['malignant']} missed)",
        "to 2e-06 (17 predictions, on validation cases",
        "No int8 file: it wasn't asked for.",
        'python -m runtime image.jpg --metadata \'{"age": ',
        "| in | `image` | uint8 | (N, 32, 32, 3) |",
        "| `model.onnx` |",
        "onnxruntime 1.99",
    ):
        assert part in text
    assert "| `model.int8.onnx` |" not in text
    assert str(tiny_run.path) not in text
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "card", "exec")
    # A table ends at the first line that isn't one of its rows.
    for line in text.splitlines():
        assert line.count("|") != 1


# Unit in metrics.json, leakage by patient and by lesion -> the unit that everybody is told.
@pytest.mark.parametrize(
    ("unit", "patient", "lesion", "told"),
    [
        ("patient", True, True, "patient"),
        ("lesion", False, True, "lesion"),
        ("image", False, False, "image"),
        ("patient", False, False, "image"),
    ],
)
def test_the_card_says_what_was_kept_in_one_split(
    tiny_run: Run, tmp_path: Path, unit: str, patient: bool, lesion: bool, told: str
) -> None:
    run = Run(shutil.copytree(tiny_run.path, tmp_path / "run"))
    none = {"train": 0.0, "train_or_val": 0.0, "per_class": {}}
    leakage = {"patient": none if patient else None, "lesion": none if lesion else None}
    write_json(run.metrics_file, {**run.metrics, "unit": unit, "leakage": leakage})
    assert run.unit == told
    text = card(run)
    assert f"intervals resample {told}s." in text
    assert [one for one in ("patient", "lesion") if f"{one}-disjoint" in text] == ([told] if told != "image" else [])
    assert (protocol_name("grouped", told) in run_title(run)[1]) is True
    assert (sentence(unnamed_patients(told)) in run_notes(run)) is (told != "patient")


def test_names_from_outside_are_text_in_the_card(tiny_run: Run) -> None:
    dataset = {**tiny_run.model["dataset"], "title": "a\n# b | <img src=x>", "citation": "[me](javascript:x)"}
    text = card(
        tiny_run, dataset=dataset, class_names={"MEL": "**m** `x`"}, missingness_shortcut="it is *so* <b>bad</b>"
    )
    for part in (r"a # b \| \<img src=x>", r"[me\](javascript:x)", r"MEL (\*\*m\*\* \`x\`)", r"\*so\* \<b>bad"):
        assert part in text
    assert r"- To cite: [me\](javascript:x)" in data_licence(dataset)
    assert r"**a # b \| \<img src=x>**" in data_licence(dataset)


def test_the_licence_of_the_data_is_stated_and_never_made_up() -> None:
    for schema, words in ((PAD, ("CC BY 4.0", "also commercially")), (ISIC, ("CC BY-NC 4.0", "**not commercially**"))):
        text = data_licence({"title": schema.title, "licence": schema.licence, "citation": schema.citation})
        assert all(word in text for word in (schema.title, schema.citation, *words))
    text = data_licence({"title": "Own data", "licence": "", "citation": ""})
    assert "Licence: not stated\n- To cite: not stated" in text
    assert "Read its terms" in data_licence({"title": "Own data", "licence": "ODbL 1.0", "citation": "me"})


def test_the_schema_accepts_metadata_of_the_model_alone(tiny_run: Run) -> None:
    made = metadata_schema(MetadataEncoder.from_json(tiny_run.model["metadata"]), "sample")
    schema = json.loads(json.dumps(made, allow_nan=False))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for valid in (
        {},
        {"age": 61, "region": "FACE", "itch": True, "grew": "UNK", "fitspatrick": 2},
        {"age": 0, "fitspatrick": "2", "background_father": "BRASIL", "smoke": None, "diameter_1": 4.5},
        {"age": None},
        {"smoke": False},
    ):
        assert validator.is_valid(valid)
    for invalid in (
        *({"age": age} for age in (-1, 121, "old", "61")),
        *({"region": "MOON"}, {"smoke": "perhaps"}, {"fitspatrick": 7}, {"shoe_size": 43}, []),
    ):
        assert not validator.is_valid(invalid)
    assert list(schema["properties"]) == [field.name for field in PAD.fields]
    age = schema["properties"]["age"]
    assert (age["unit"], age["description"]) == ("years", "Age of the patient, in years")
