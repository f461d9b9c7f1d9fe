"""What a form may hold, as JSON Schema, for programs that send one."""

from __future__ import annotations

from typing import Any

from dualrefnet.data.metadata import MetadataEncoder


def form_schema(metadata: MetadataEncoder, name: str, reads_metadata: bool = True) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a form.

    Args:
        metadata: the fitted encoder.
        name: of the model.
        reads_metadata: False: the model asks nothing, whatever the encoder knows.
    """
    questions = {}
    asked = zip(metadata.fields, metadata.levels, strict=True) if reads_metadata else ()
    for one, levels in asked:
        said = one.description or one.name.replace("_", " ")
        question: dict[str, Any] = {"description": f"{said}, in {one.unit}" if one.unit else said}
        if one.unit:
            question["unit"] = one.unit
        if one.kind == "numeric":
            limits = {"minimum": one.minimum, "maximum": one.maximum}
            number = {"type": "number", **{key: value for key, value in limits.items() if value is not None}}
            question["anyOf"] = [number, {"enum": [*one.missing_codes, None]}]
        else:
            words: list[str | bool] = list(dict.fromkeys([*levels, *one.aliases, *one.missing_codes]))
            if one.kind == "boolean":
                words = [True, False, *(word for word in words if word not in ("True", "False"))]
            # Categories that are whole numbers, such as skin types, may be sent as such.
            question["enum"] = [*words, *(int(word) for word in words if isinstance(word, str) and word.isdecimal()), None]
        questions[one.name] = question
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Form of {name}",
        "description": "A patient's answers. None is compulsory; null means the same as leaving the question out.",
        "type": "object",
        "properties": questions,
        "additionalProperties": False,
    }
