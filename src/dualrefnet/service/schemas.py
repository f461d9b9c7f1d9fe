"""What the service answers, as pydantic models, and what OpenAPI says of its statuses."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction

NOTICE = "Not a medical device and not a diagnosis: for research only. A doctor must look at the lesion itself."


class Refusal(Exception):
    """A request that isn't answered, and why.

    Attributes:
        status: of HTTP.
        code: a word for programs.
        message: a sentence for people; it holds no value of the form.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


class ErrorDetail(BaseModel):
    """Why there is no answer."""

    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")
    request_id: str = Field(description="Names this request in the service's log.")


class ErrorBody(BaseModel):
    """Body of every answer with a status of 400 or more."""

    error: ErrorDetail


class Alive(BaseModel):
    """The process lives, or can answer."""

    status: str


class PredictionBody(BaseModel):
    """What the model says of one lesion."""

    request_id: str
    model: str
    label: str = Field(description="The likeliest class.")
    probabilities: dict[str, float] = Field(description="Class -> probability.")
    likely: list[str] = Field(description="The set of classes that holds the right one as often as was promised; empty if not calibrated.")
    malignancy: float | None = Field(description="Sum of the probabilities of the malignant classes; null if none is.")
    refer: bool | None = Field(
        description="Whether the malignancy reaches the referral threshold that was fitted for such inputs; null if there is none."
    )
    availability: str = Field(description="What was given: the group of inputs whose temperature, sets and threshold were used.")
    out_of_scope: float | None = Field(description="More than 1: the picture is unlike the photographs that the model has learned from.")
    warnings: list[str]
    images: int = Field(description="How many photographs were read.")
    notice: str


class FieldChange(BaseModel):
    """How much one answer of the form changed the probability."""

    name: str
    change: float = Field(description="Probability with the answer minus probability if it had been left blank.")


class Heat(BaseModel):
    """Which places of the photograph the probability hangs on."""

    png: str = Field(description="Base64 of an 8-bit grey PNG.", json_schema_extra={"contentEncoding": "base64"})
    maximum: float = Field(description="How much the probability falls if a place of grey 255 is covered.")


class ExplanationBody(BaseModel):
    """What the probability of one class hangs on."""

    label: str
    fields: list[FieldChange]
    heat: Heat | None


class ExplainedBody(PredictionBody):
    """A prediction with its explanation."""

    explanation: ExplanationBody


class FieldBody(BaseModel):
    """A field of the form."""

    name: str
    kind: str
    unit: str | None
    minimum: float | None
    maximum: float | None
    description: str
    levels: list[str] = Field(description="What a categorical answer may be; empty for others.")
    effect: float | None = Field(
        description="How much of the probability moves, on average, when the field is left out; null if that wasn't measured."
    )


class LimitsBody(BaseModel):
    """What a request may be at most."""

    bytes: int
    pixels: int
    images: int
    metadata_bytes: int


class ModelBody(BaseModel):
    """What the model is."""

    name: str
    title: str
    classes: list[str]
    class_names: dict[str, str]
    malignant: list[str]
    fields: list[FieldBody]
    reads_image: bool
    needs_image: bool
    size: int
    limits: LimitsBody
    description: dict[str, Any] = Field(description="What it was trained on and how well it did.")
    warning: str | None = Field(description="Why its answers to patients with blank metadata can't be relied on; null if they can.")
    notice: str


def prediction_body(prediction: Prediction, model: str, images: int, request_id: str) -> dict[str, Any]:
    """Return the fields of a `PredictionBody`."""
    return {
        "request_id": request_id,
        "model": model,
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "likely": list(prediction.likely),
        "malignancy": prediction.malignancy,
        "refer": prediction.refer,
        "availability": prediction.availability,
        "out_of_scope": prediction.out_of_scope,
        "warnings": list(prediction.warnings),
        "images": images,
        "notice": NOTICE,
    }


def explanation_body(explanation: Explanation) -> dict[str, Any]:
    """Return the fields of an `ExplanationBody`; where covering raises the probability, the heat is 0."""
    heat = None
    if explanation.heat is not None:
        falls = np.clip(np.nan_to_num(np.asarray(explanation.heat, dtype=np.float64)), 0, None)
        maximum = float(falls.max())
        stream = io.BytesIO()
        Image.fromarray(np.rint(falls * (255 / maximum if maximum > 0 else 0)).astype(np.uint8)).save(stream, "PNG")
        heat = {"png": base64.b64encode(stream.getvalue()).decode("ascii"), "maximum": maximum}
    fields = [{"name": name, "change": float(change)} for name, change in explanation.fields.items()]
    return {"label": explanation.label, "fields": fields, "heat": heat}


def error_bytes(code: str, message: str, request_id: str) -> bytes:
    """Return the body of an answer that says what went wrong."""
    return json.dumps({"error": {"code": code, "message": message, "request_id": request_id}}).encode()
