"""The model card of a bundle (`README.md`, from `card.md.jinja`), and the licence of its training data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dualrefnet.display.format import (
    MEASURE_NAMES,
    availability_table,
    escape_markdown,
    interval,
    interval_of,
    number,
    percent,
    protocol_name,
)
from dualrefnet.errors import DependencyError, install_hint
from dualrefnet.files import read_csv
from dualrefnet.models.registry import METHODS
from dualrefnet.report.provenance import run_notes, run_title
from dualrefnet.run import Run

HEADLINES = ("accuracy", "balanced_accuracy", "auc_macro_ovr", "f1_macro", "kappa", "ece", "brier")
MALIGNANT = ("sensitivity", "specificity", "ppv", "npv", "auc")
# Licence as data sets state it -> the Hub's identifier, and what it asks of whoever uses the model.
LICENCES = {
    "CC BY 4.0": ("cc-by-4.0", "You may use and share them, also commercially, if you name their authors."),
    "CC BY-NC 4.0": (
        "cc-by-nc-4.0",
        "You may use and share them if you name their authors, and **not commercially**. Whether a model trained on "
        "them may be used commercially is a question for a lawyer; assume that it may not. A clinic that charges for "
        "its services is commercial use.",
    ),
    "Apache-2.0": ("apache-2.0", "They are synthetic: drawn by a program that comes with the software."),
}
FILES = {
    "model.onnx": "the network, 32-bit",
    "model.int8.onnx": "the network, its image encoders in 8-bit integers",
    "model.pt2": "the same network for `torch.export.load`",
    "bundle.json": "classes, preprocessing, encoding of metadata, calibration, measures",
    "out_of_scope.safetensors": "the out-of-distribution score",
    "form.schema.json": "JSON Schema (2020-12) of the metadata",
    "DATA_LICENCE.md": "the licence of the training data",
    "SHA256SUMS": "the SHA-256 of every file, compared when the bundle is loaded, or by `sha256sum --check SHA256SUMS`",
    "runtime/": "the program above that needs no dualrefnet",
}


def model_card(bundle: Mapping[str, Any], run: Run, files: Sequence[str]) -> str:
    """Return the bundle's README.md, from the content of `bundle.json`, its run, and the names of its files."""
    try:
        import jinja2
    except ImportError:
        raise DependencyError(f"a model card needs jinja2: {install_hint('export')}") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dualrefnet.deploy", ""),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        # Names of data sets, classes, fields and categories come from outside; `safe` marks what is Markdown or code.
        finalize=lambda value: _plain_text(value) if type(value) is str else value,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "interval": interval_of,
        "sentence": lambda text: f"{text[0].upper()}{text[1:]}",
    }
    metrics, dataset = run.metrics, bundle["dataset"]
    reads_metadata = bool(bundle["metadata"]["fields"]) and METHODS[bundle["method"]].reads_metadata
    example = json.dumps(_example(bundle["metadata"]) if reads_metadata else {})
    title, subtitle = run_title(run)
    # A run that was trained on all was measured on none.
    availability = metrics.get("availability") if metrics["protocol"] != "all" else None
    return environment.get_template("card.md.jinja").render(
        header=yaml.safe_dump(_header(bundle, reads_metadata), sort_keys=False),
        title=title,
        subtitle=subtitle,
        bundle=bundle,
        dataset=dataset,
        licence_terms=_terms(dataset["licence"]),
        earlier=[{**one, "terms": _terms(one["licence"])} for one in bundle.get("trained_on", ())],
        protocol=protocol_name(dataset["protocol"], run.unit),
        unit=run.unit,
        reads_metadata=reads_metadata,
        example=shlex.quote(example),
        example_python=example.replace(": true", ": True").replace(": false", ": False"),
        metrics=metrics,
        measures=_measures(metrics),
        availability=availability_table(availability).markdown(heading=False).strip() if availability else None,
        subgroups=_subgroups(run),
        notes=run_notes(run),
        made=run.fingerprint,
        files={name: meaning for name, meaning in FILES.items() if name in files},
    )


def data_licence(dataset: Mapping[str, Any], earlier: Sequence[Mapping[str, str]] = ()) -> str:
    """Return DATA_LICENCE.md for a data set and those of `earlier` runs, from which the model started."""
    learned = [dataset, *({**one, "title": one["dataset"]} for one in earlier)]
    titles = " and ".join(f"**{_plain_text(one['title'])}**" for one in learned)
    also = " The model started from the parameters of another run, so all of these apply:" if earlier else ""
    return f"""# Licence of the training data

The weights in this folder were learned from {titles}.{also}

{chr(10).join(_licence(one) for one in learned)}
No image and no patient's metadata are in this folder. What was learned from them is: weights, means and categories of
the metadata, and measures on the test split.

The software, and with it the folder `runtime/`, is under Apache-2.0. The ImageNet weights from which the image encoder
started have licences of their own; README.md names them.
"""


def _licence(dataset: Mapping[str, Any]) -> str:
    licence, citation = (_plain_text(dataset[name]) for name in ("licence", "citation"))
    terms = _terms(dataset["licence"]) or "Read its terms before you pass the model on or use it."
    if not licence:
        terms = (
            "Whoever made the model didn't state under which licence the data may be used. Ask before you pass the "
            "model on or use it."
        )
    return f"- Licence: {licence or 'not stated'}\n- To cite: {citation or 'not stated'}\n\n{terms}\n"


def _plain_text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return escape_markdown(" ".join(text.split()))


def _terms(licence: str) -> str:
    return LICENCES.get(licence, ("", ""))[1]


def _header(bundle: Mapping[str, Any], reads_metadata: bool) -> dict[str, Any]:
    stated = {bundle["dataset"]["licence"], *(one["licence"] for one in bundle.get("trained_on", ()))}
    # Several licences apply together, and the Hub takes one.
    licence = {"license": LICENCES.get(stated.pop(), ("other", ""))[0] if len(stated) == 1 else "other"}
    if licence["license"] == "other":
        licence |= {"license_name": "of-the-training-data", "license_link": "DATA_LICENCE.md"}
    tags = ["dualrefnet", "dermatology", "skin-lesion", "medical", "research-only", "onnx"]
    tags += ["multimodal"] if bundle["reads_image"] and reads_metadata else []
    tags += ["synthetic-not-clinical"] if bundle["dataset"]["drawn"] else []
    return {
        **licence,
        "library_name": "dualrefnet",
        "pipeline_tag": "image-classification" if bundle["reads_image"] else "tabular-classification",
        "tags": tags,
        "metrics": ["accuracy", "balanced_accuracy"],
    }


def _example(metadata: Mapping[str, Any], at_most: int = 4) -> dict[str, Any]:
    """Return values of some fields, always recorded ones first: the mean of a number, the first category of others."""
    fields = list(zip(metadata["fields"], metadata["levels"], metadata["centre"], strict=True))
    values: dict[str, Any] = {}
    for field, categories, mean in sorted(fields, key=lambda one: one[0].get("tier") != "M1")[:at_most]:
        if field["kind"] == "numeric":
            values[field["name"]] = round(mean)
        elif categories:
            values[field["name"]] = categories[0] == "True" if field["kind"] == "boolean" else categories[0]
    return values


def _measures(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    malignant = metrics.get("malignant") or {}
    found = [(key, metrics, key) for key in HEADLINES]
    found += [(f"malignant_{key}", malignant, key) for key in MALIGNANT if key in malignant]
    return [(MEASURE_NAMES[name], number(values[key]), interval_of(values, key, ".3f")) for name, values, key in found]


def _subgroups(run: Run) -> dict[str, Any] | None:
    """Return the accuracy of each subgroup, and those too small for one; None if it wasn't measured."""
    file = run.path / "probes" / "subgroups.csv"
    if not file.is_file():
        return None
    table = read_csv(file, keep_default_na=False, na_values=[""])
    table["interval"] = [interval(low, high, ".2f") for low, high in zip(table["low"], table["high"], strict=True)]
    measured = table[(table["measure"] == "accuracy") & table["value"].notna()]
    few = table[~table["measured"].astype(bool)].drop_duplicates(["field", "level"])
    return {"measured": measured.to_dict("records"), "few": few.to_dict("records")}
