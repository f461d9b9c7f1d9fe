"""What a model card says of the networks in a bundle: their answers compared, their inputs and outputs."""

# also: The model card of a bundle: what the model is, was trained on and is worth, for a person who has nothing but the
# folder.

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import yaml

from dualrefnet.display.format import MEASURE_NAMES, availability_table, interval, interval_of, number, percent
from dualrefnet.models.registry import METHODS
from dualrefnet.report.provenance import run_notes, run_title
from dualrefnet.run import Run


def compared_networks(bundle: Mapping[str, Any]) -> str:
    """Return the section that sets the networks beside each other.

    Args:
        bundle: content of `bundle.json`.
    """
    network, int8 = bundle["networks"]["float32"], bundle["networks"].get("int8")
    parity = network["parity"]
    text = (
        f"## The files compared\n\n`model.onnx` gives the probabilities of the trained model to {parity['max_probability_difference']:.1g} "
        f"at most ({parity['cases']} answers, {parity['checked_on']}; more than {parity['limit']:g} would have stopped the export)."
    )
    if int8 is None:
        return f"{text}\n\nNo int8 file: {bundle['no_int8']}."
    found = int8["measured"]
    before, after = found["float32"], found["int8"]
    rows = [("accuracy", f"{before['accuracy']:.3f}", f"{after['accuracy']:.3f}")]
    rows.append(("balanced accuracy", f"{before['balanced_accuracy']:.3f}", f"{after['balanced_accuracy']:.3f}"))
    if "false_alarms" in after:
        rows.append(("share warned of as no lesion", f"{before['false_alarms']:.3f}", f"{after['false_alarms']:.3f}"))
    for one in found["speed"]:
        speed = f"{one['int8_ms']:.1f} ({one['times_as_fast']:.2f} times as fast)"
        rows.append((f"milliseconds for {one['batch']}", f"{one['float32_ms']:.1f}", speed))
    rows.append(("megabytes", f"{network['bytes'] / 1e6:.1f}", f"{int8['bytes'] / 1e6:.1f}"))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"{text}\n\n`model.int8.onnx`: {int8['verdict']}\n\n"
        f"| {found['cases']} validation images | float32 | int8 |\n|:--|--:|--:|\n{table}\n\n"
        f"The same class for {found['same_label']:.1%} of the images; probabilities differ by {found['mean_probability_difference']:.3f} "
        f"on average and {found['max_probability_difference']:.2f} at most. Timed on {found['processor']}, both in turn, medians. Ranges "
        f"were learned from {int8['calibrated_on']} training images. Temperature, sets, referral and the check of pictures were fitted on "
        "the float32 model. Processors without instructions for 8-bit products (VNNI) may be slower and may round more coarsely: measure "
        "there before relying on it."
    )


def network_interface(bundle: Mapping[str, Any], reads_form: bool) -> str:
    """Return the section that says what goes into the ONNX files and what comes out.

    Args:
        bundle: content of `bundle.json`.
        reads_form: False if the model ignores the form.
    """
    network = bundle["networks"]["float32"]
    rows = [
        f"| {way} | `{one['name']}` | {one['type']} | {one['shape']} | {one['meaning']} |"
        for way, key in (("in", "inputs"), ("out", "outputs"))
        for one in network[key]
    ]
    table = "\n".join(rows)
    text = f"## Inputs and outputs of the ONNX files\n\n| | name | type | shape | |\n|:--|:--|:--|:--|:--|\n{table}\n\nN is free. "
    text += "Probabilities are the softmax of the logits; `bundle.json` has the temperature."
    names = ", ".join(f"`{field['name']}`" for field in bundle["metadata"]["fields"])
    if not names or not reads_form:
        return text
    return f"{text}\n\nQuestions of the form, none of them compulsory: {names}. `form.schema.json` has their values, units and limits."


HEADLINES = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro", "kappa", "ece", "brier")


CANCER = ("sensitivity", "specificity", "ppv", "npv", "auc")


# Licence as data sets state it -> the Hub's word for it, and what it asks of whoever uses the model.
LICENCES = {
    "CC BY 4.0": ("cc-by-4.0", "You may use and share them, also commercially, if you name their authors."),
    "CC BY-NC 4.0": (
        "cc-by-nc-4.0",
        "You may use and share them if you name their authors, and **not commercially**. Whether a model trained on them may be used "
        "commercially is a question for a lawyer; assume that it may not. A clinic that charges for its services is commercial use.",
    ),
    "Apache-2.0": ("apache-2.0", "They were drawn by a program that comes with the software."),
}


PROTOCOLS = {
    "paper": "the split of the paper, in which patients and lesions may stand on both sides",
    "grouped": "patients kept apart: nobody is in training and in test",
    "grouped-cv": "patients kept apart, one fold of a cross-validation",
}


_MEANINGS = {
    "model.onnx": "the network, 32-bit",
    "model.int8.onnx": "the network, its image encoders in 8-bit whole numbers",
    "model.pt2": "the same network for `torch.export.load`",
    "bundle.json": "classes, preprocessing, encoding of the form, calibration, measures",
    "out_of_scope.safetensors": "the check for pictures that are no lesions",
    "form.schema.json": "what a form may hold (JSON Schema 2020-12)",
    "DATA_LICENCE.md": "the licence of the data that it learned from",
    "runtime/": "the program above that needs no dualrefnet",
}


def model_card(bundle: Mapping[str, Any], run: Run, files: Sequence[str]) -> str:
    """Return the bundle's README.md.

    Args:
        bundle: content of `bundle.json`.
        run: that was exported.
        files: names of what lies in the bundle.
    """
    title, below = run_title(run)
    metrics = run.metrics
    sections = [
        _header(bundle),
        f"# {title}\n\n{below}.",
        "> **Not a medical device.** Not cleared or certified for diagnosis, triage or treatment. For research and teaching: no decision "
        "about a person may rest on what it says, and a low malignancy is no all-clear.",
        _shortcut(bundle),
        _purpose(bundle),
        _use(bundle),
        _data(bundle, run),
        _measured(bundle, metrics),
        _availability(metrics),
        _calibration(metrics),
        _subgroups(run),
        compared_networks(bundle),
        network_interface(bundle, _reads_form(bundle)),
        _files(files),
        _made(bundle, run),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def data_licence(dataset: Mapping[str, Any]) -> str:
    """Return the bundle's DATA_LICENCE.md.

    Args:
        dataset: title, licence and citation of the data set.
    """
    licence = dataset["licence"]
    _, meaning = LICENCES.get(licence, ("other", ""))
    if not licence:
        meaning = "Whoever made the model didn't state under which licence the data may be used. Ask them before you pass the model on or use it."
    elif not meaning:
        meaning = "Read its terms before you pass the model on or use it."
    return (
        f"# Licence of the training data\n\nThe weights in this folder were learned from **{dataset['title']}**.\n\n"
        f"- Licence: {licence or 'not stated'}\n- To cite: {dataset['citation'] or 'not stated'}\n\n{meaning}\n\n"
        "No photograph and no form of the data set is in this folder. What was learned from them is: weights, means and categories of the "
        "answers, and the measures of the test side.\n\n"
        "The software, and with it the folder `runtime/`, is under Apache-2.0. Weights from which the image encoder started (ImageNet) "
        "have licences of their own; README.md names them.\n"
    )


def _header(bundle: Mapping[str, Any]) -> str:
    """Return the block of YAML that the Hub reads."""
    dataset = bundle["dataset"]
    known, _ = LICENCES.get(dataset["licence"], ("other", ""))
    licence = {"license": known}
    if known == "other":
        licence |= {"license_name": "of-the-training-data", "license_link": "DATA_LICENCE.md"}
    tags = [
        "dualrefnet",
        "dermatology",
        "skin-lesion",
        "medical",
        "research-only",
        "onnx",
        *(["multimodal"] if bundle["reads_image"] and _reads_form(bundle) else []),
    ]
    header = {
        **licence,
        "library_name": "dualrefnet",
        "pipeline_tag": "image-classification" if bundle["reads_image"] else "tabular-classification",
        "tags": [*tags, *(["drawn-pictures-not-clinical"] if dataset["drawn"] else [])],
        "metrics": ["accuracy", "balanced_accuracy"],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _shortcut(bundle: Mapping[str, Any]) -> str:
    """Warn of a model that was exported although it takes missing metadata for a sign of a benign lesion."""
    reason = bundle["missingness_shortcut"]
    if reason is None:
        return ""
    return (
        '> <strong style="color: #b00020">WARNING: not for patients whose metadata may be missing.</strong> '
        f"{reason[0].upper()}{reason[1:]}. It was exported all the same, for research."
    )


def _availability(metrics: Mapping[str, Any]) -> str:
    measured = metrics.get("availability")
    if measured is None:
        return ""
    return f"## Missing inputs\n\n{availability_table(measured).markdown(heading=False)}".strip()


def _purpose(bundle: Mapping[str, Any]) -> str:
    names, malignant = bundle["class_names"], bundle["malignant"]
    classes = ", ".join(f"{label} ({names[label]})" if label in names else label for label in bundle["classes"])
    reads = "a photograph of a skin lesion" if bundle["reads_image"] else "the patient's answers alone, no photograph"
    if bundle["reads_image"] and _reads_form(bundle):
        reads += " and any of the patient's answers" + (
            "; it answers without the photograph too" if bundle["learned_tokens"] else ""
        )
    cancer = (
        f" Malignant among them: {', '.join(malignant)}."
        if malignant
        else " The data set names none of them malignant."
    )
    return (
        f"## What it is for\n\nIt reads {reads}, and gives a probability to each of these classes: {classes}.{cancer}\n\n"
        "- For research and teaching: to measure, compare and take apart.\n"
        "- Not for skin without a lesion, for other diseases, or for pictures that aren't photographs of skin: it always answers with one "
        "of its classes. It warns of pictures unlike those of its training, and can't warn of a disease that it never met.\n"
        "- Not for other kinds of picture: a model of smartphone photographs doesn't work on dermoscopic ones, nor the reverse.\n"
        "- Not for people unlike those it was trained on: see below who they were."
    )


def _use(bundle: Mapping[str, Any]) -> str:
    form = json.dumps(_example(bundle["metadata"]) if _reads_form(bundle) else {})
    as_python = form.replace(": true", ": True").replace(": false", ": False")
    picture, file = ('"photograph.jpg"', "photograph.jpg ") if bundle["reads_image"] else ("None", "")
    source = "--images photographs/ --metadata forms.csv" if bundle["reads_image"] else "--csv forms.csv"
    return f"""## How to use it

With dualrefnet (`pip install 'dualrefnet[deploy]'`), FOLDER being this one; from a hub, `dualrefnet.Predictor.from_pretrained("ORG/NAME")`:

```python
import dualrefnet

answer = dualrefnet.Predictor.load("FOLDER").predict({picture}, {as_python})
print(answer.label, answer.probabilities, answer.likely, answer.refer, answer.warnings)
```

```bash
dualrefnet predict FOLDER {source} --out predictions.csv
dualrefnet serve FOLDER    # a page in the browser, and an interface for programs
```

Without dualrefnet (`pip install onnxruntime numpy opencv-python-headless`), in this folder. It runs the Python files of the folder
`runtime/`: if the bundle comes from somebody you don't know, read them first.

```bash
python -m runtime {file}--form '{form}'
```"""


def _example(metadata: Mapping[str, Any], at_most: int = 4) -> dict[str, Any]:
    """Return values of some fields, first of those that are always recorded: the mean of a number, the first category
    of the others.
    """
    known = sorted(
        zip(metadata["fields"], metadata["levels"], metadata["centre"], strict=True),
        key=lambda one: one[0].get("tier") != "M1",
    )
    return {
        field["name"]: round(centre)
        if field["kind"] == "numeric"
        else levels[0] == "True"
        if field["kind"] == "boolean"
        else levels[0]
        for field, levels, centre in known[:at_most]
        if levels or field["kind"] == "numeric"
    }


def _data(bundle: Mapping[str, Any], run: Run) -> str:
    dataset, rows = bundle["dataset"], run.fingerprint["data"]["rows_used"]
    _, meaning = LICENCES.get(dataset["licence"], ("", ""))
    protocol = PROTOCOLS.get(dataset["protocol"], dataset["protocol"])
    lines = [
        f"Data: {dataset['title']}, {rows:,} rows for training, validation and test together.",
        f"Licence of the data: {dataset['licence'] or 'not stated'}. {meaning}".rstrip(),
        f"To cite: {dataset['citation'] or 'not stated'}",
        f"Protocol: `{dataset['protocol']}`, {protocol}.",
    ]
    notes = run_notes(run) or ["Nothing beyond the protocol is known to spoil the numbers."]
    return (
        f"## What it was trained on\n\n{_listed(lines)}\n\nWhat to know before believing a number:\n\n{_listed(notes)}"
    )


def _measured(bundle: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    drawn = " **Drawn pictures, not clinical: they say that the software works.**" if metrics["drawn"] else ""
    lines = [
        f"| {MEASURE_NAMES[key]} | {number(metrics[key])} | {interval_of(metrics, key, '.3f')} |" for key in HEADLINES
    ]
    malignant = metrics.get("malignant") or {}
    lines += [
        f"| {MEASURE_NAMES['malignant_' + key]} | {number(malignant[key])} | {interval_of(malignant, key, '.3f')} |"
        for key in CANCER
        if key in malignant
    ]
    classes = []
    for label, found in metrics["per_class"].items():
        cells = (
            f"{number(found[key])} {interval_of(found, key, '.2f')}" for key in ("sensitivity", "specificity", "auc")
        )
        classes.append(f"| {_cell(label)} | {found['support']} | {' | '.join(cells)} |")
    return (
        f"## What it is worth\n\nTest side of {bundle['dataset']['title']}, {metrics['support']} images, protocol "
        f"`{metrics['protocol']}`.{drawn} Intervals of 95% are over patients: what other patients of the same kind would have changed.\n\n"
        "| measure | value | 95% interval |\n|:--|--:|:--|\n" + "\n".join(lines) + "\n\n"
        "| class | images | sensitivity | specificity | AUC |\n|:--|--:|:--|:--|:--|\n" + "\n".join(classes)
    )


def _calibration(metrics: Mapping[str, Any]) -> str:
    if "calibrated" not in metrics:
        return "## Probabilities\n\nNot calibrated: the run is older than that. Read no number as a risk."
    found = metrics["calibrated"]
    sets, referral, alarms = found["conformal"]["marginal"], found["referral"], metrics.get("out_of_scope")
    lines = [
        f"Temperature {found['temperature']:.2f}: the expected calibration error is {number(found['before']['ece'])} before, "
        f"{number(found['after']['ece'])} after.",
        f"Sets of classes that can't be excluded (`likely`): {found['conformal']['promised']:.0%} promised, on the test side "
        f"{percent(sets, 'coverage')} hold the right class, with {sets['mean_size']:.2f} classes on average.",
    ]
    if referral is not None and referral["sensitivity"] is not None:
        lines.append(
            f"Referral (`refer`) from a malignancy of {referral['threshold']:.2f}: meant to find {referral['wanted']:.0%} of the cancers, "
            f"on the test side it found {percent(referral, 'sensitivity')} ({referral['missed']} of {referral['malignant']} missed) and "
            f"referred {percent(referral, 'referred')} of all."
        )
    if alarms is not None:
        lines.append(
            f"Check of pictures (`out_of_scope` above 1): {percent(alarms, 'false_alarm_rate')} of the test photographs, which all show a "
            "lesion, are warned of."
        )
    lines += [f"{remark[0].upper()}{remark[1:]}." for remark in found["remarks"]]
    return (
        "## Probabilities, sets, referral\n\nFitted on the validation side, for inputs as they were recorded, and valid for patients like "
        f"those alone.\n\n{_listed(lines)}"
    )


def _subgroups(run: Run) -> str:
    file = run.path / "probes" / "subgroups.csv"
    if not file.is_file():
        return "## For whom\n\nNot measured by subgroup: `dualrefnet probe RUN` does it, and an export after that has the table here."
    table = pd.read_csv(file, keep_default_na=False, na_values=[""])
    found = table[(table["measure"] == "accuracy") & table["value"].notna()]
    rows = []
    for row in found.to_dict("records"):
        bounds = interval(row["low"], row["high"], ".2f")
        rows.append(
            f"| {_cell(row['field'])} | {_cell(row['level'])} | {row['images']} | {number(row['value'])} {bounds} |"
        )
    few = table[~table["measured"].astype(bool)].drop_duplicates(["field", "level"])
    unknown = "; ".join(f"{row.field} {row.level} ({row.images})" for row in few.itertuples(index=False))
    return (
        "## For whom\n\nAccuracy on the test side by level, with 95% intervals over patients. Cases differ between levels, so a gap says "
        "that results differ, not why.\n\n| field | level | images | accuracy |\n|:--|:--|--:|:--|\n"
        + "\n".join(rows)
        + (f"\n\nToo few images for a number, so nothing is known (images in brackets): {unknown}." if unknown else "")
    )


def _files(files: Sequence[str]) -> str:
    rows = "\n".join(f"| `{name}` | {meaning} |" for name, meaning in _MEANINGS.items() if name in files)
    return (
        f"## Files\n\n| file | what it is |\n|:--|:--|\n{rows}\n\nNone of them is a pickle or holds one. But `torch.export.load` would "
        "unpickle what a forged `model.pt2` holds: don't load one from somebody you don't trust. dualrefnet never loads it."
    )


def _made(bundle: Mapping[str, Any], run: Run) -> str:
    made = run.fingerprint
    data, commit = made["data"], made["git_commit"] or "not known"
    lines = [
        f"Trained with dualrefnet {made['dualrefnet']}, commit {commit}, torch {made['packages']['torch']}, Python {made['python']}, "
        f"seed {made['seed']}, {made['precision']}.",
        f"Weights at the start: {'; '.join(dict.fromkeys(source['description'] for source in made['weights']))}.",
        f"Exported with {', '.join(f'{name} {version}' for name, version in bundle['exported_with'].items())}.",
        f"Fingerprints of the data: table `{data['table_sha256'][:16]}`, split `{data['split_sha256'][:16]}`.",
    ]
    return f"## How it was made\n\n{_listed(lines)}"


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def _reads_form(bundle: Mapping[str, Any]) -> bool:
    return bool(bundle["metadata"]["fields"]) and METHODS[bundle["method"]].reads_metadata
