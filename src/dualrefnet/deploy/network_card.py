"""What a model card says of the networks in a bundle: their answers compared, their inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
