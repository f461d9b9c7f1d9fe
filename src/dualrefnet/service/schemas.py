"""The bodies of requests and responses, and the description of the API (OpenAPI)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from PIL import Image
from pydantic import BaseModel, Field

from dualrefnet.service.settings import ServiceSettings

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor


NOTICE = "Not a medical device and not a diagnosis: for research only. A physician must examine the lesion."


class Refusal(Exception):
    """A request that is refused, with a code for programs and a message for people that holds no metadata."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = {**(headers or {}), **({"Retry-After": "1"} if retry else {})}


class ErrorDetail(BaseModel):
    """Why the request was refused."""

    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")
    request_id: str = Field(description="Identifies this request in the service's log.")


class ErrorBody(BaseModel):
    """Body of every response with a status of 400 or more."""

    error: ErrorDetail


class Alive(BaseModel):
    """State of the process."""

    status: str


class PredictionBody(BaseModel):
    """Prediction for one lesion."""

    request_id: str
    model: str
    label: str = Field(description="The predicted class.")
    probabilities: dict[str, float] = Field(description="Class -> calibrated probability.")
    likely: list[str] = Field(description="Conformal prediction set at the model's coverage; empty if not calibrated.")
    malignancy: float | None = Field(description="Sum of the probabilities of the malignant classes; null if none is.")
    refer: bool | None = Field(
        description="Whether the malignancy reaches the referral threshold for such inputs; null if there is none."
    )
    availability: str = Field(
        description="The group of available inputs whose temperature, sets and threshold were used."
    )
    out_of_scope: float | None = Field(description="Out-of-distribution score; above 1 the image is unlike training.")
    warnings: list[str]
    images: int = Field(description="Number of images that were read.")
    notice: str


class FieldChange(BaseModel):
    """Attribution of one metadata field."""

    name: str
    change: float = Field(description="Probability with the value minus probability with the field missing.")


class Heat(BaseModel):
    """Occlusion saliency of the image."""

    png: str = Field(description="Base64 of an 8-bit grey PNG.", json_schema_extra={"contentEncoding": "base64"})
    maximum: float = Field(description="Fall of the probability when a patch of grey 255 is occluded.")


class ExplanationBody(BaseModel):
    """What the probability of one class depends on."""

    label: str
    fields: list[FieldChange]
    heat: Heat | None


class ExplainedBody(PredictionBody):
    """A prediction with its explanation."""

    explanation: ExplanationBody


class FieldBody(BaseModel):
    """A metadata field."""

    name: str
    kind: str
    unit: str | None
    minimum: float | None
    maximum: float | None
    description: str
    levels: list[str] = Field(description="Categories of a categorical field; empty for others.")
    effect: float | None = Field(
        description="Mean change of the probabilities when the field is missing; null if it wasn't measured."
    )


class LimitsBody(BaseModel):
    """Limits of a request."""

    bytes: int
    pixels: int
    images: int
    metadata_bytes: int


class ModelBody(BaseModel):
    """Description of the model."""

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
    description: dict[str, Any] = Field(description="Training data and test metrics.")
    warning: str | None = Field(
        description="Why predictions with missing metadata can't be relied on; null if they can."
    )
    notice: str


def prediction_body(prediction: Prediction, model: str, images: int, request_id: str) -> dict[str, Any]:
    return {**vars(prediction), "request_id": request_id, "model": model, "images": images, "notice": NOTICE}


def explanation_body(explanation: Explanation) -> dict[str, Any]:
    """Return the fields of an `ExplanationBody`; where occlusion raises the probability, the saliency is 0."""
    heat = None
    if explanation.saliency is not None:
        falls = np.clip(np.nan_to_num(np.asarray(explanation.saliency, dtype=np.float64)), 0, None)
        maximum = float(falls.max())
        stream = io.BytesIO()
        Image.fromarray(np.rint(falls * (255 / maximum if maximum > 0 else 0)).astype(np.uint8)).save(stream, "PNG")
        heat = {"png": base64.b64encode(stream.getvalue()).decode("ascii"), "maximum": maximum}
    fields = [{"name": name, "change": float(change)} for name, change in explanation.fields.items()]
    return {"label": explanation.label, "fields": fields, "heat": heat}


def model_body(predictor: Predictor, settings: ServiceSettings) -> ModelBody:
    effects = predictor.decision.field_effects if predictor.decision is not None else {}
    fields = [
        {
            **{name: getattr(field, name) for name in ("name", "kind", "unit", "minimum", "maximum", "description")},
            "levels": predictor.categories(field.name) if field.kind == "categorical" else [],
            "effect": effects.get(field.name),
        }
        for field in predictor.fields
    ]
    limits = LimitsBody(
        bytes=settings.max_upload,
        pixels=settings.max_pixels,
        images=settings.max_images,
        metadata_bytes=settings.max_metadata,
    )
    same = ModelBody.model_fields.keys() - {"fields", "limits", "warning", "notice"}
    described = {name: getattr(predictor, name) for name in same}
    warning = predictor.shortcut
    return ModelBody.model_validate(
        {**described, "fields": fields, "limits": limits, "warning": warning, "notice": NOTICE}
    )


def error_json(code: str, message: str, request_id: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "request_id": request_id}}).encode()


ANY_ROUTE = {
    400: "The request isn't valid HTTP.",
    403: "The request comes from a page of another web site, or names another host.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    431: "The headers are too large.",
    500: "An internal error.",
    503: "Too many connections.",
}
PREDICTION_ROUTE = {
    **ANY_ROUTE,
    400: "The request isn't valid: not multipart, not strict JSON, an unknown part, or too many parts.",
    413: "The request, or a part of it, is too large.",
    415: "The request isn't multipart/form-data.",
    422: "An image can't be decoded, or the metadata don't suit the model.",
    429: "Too many requests are waiting; retry after Retry-After seconds.",
    503: "Too busy to respond in time, or too many connections; retry after Retry-After seconds.",
}
PROBES = ("/healthz", "/readyz")


def error_responses(
    statuses: dict[int, str], settings: ServiceSettings | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` of a route; with settings, of one that may need a key."""
    if settings is not None and settings.api_keys:
        statuses = {**statuses, 401: "The API key is missing or wrong."}
    return {status: {"model": ErrorBody, "description": statuses[status]} for status in sorted(statuses)}


def request_body(predictor: Predictor, settings: ServiceSettings, *, explained: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    required: list[str] = []
    if predictor.reads_image:
        properties["images"] = {
            "type": "array",
            "description": "An image of the lesion." if explained else "Images of one lesion.",
            "minItems": 1,
            "maxItems": 1 if explained else settings.max_images,
            "items": {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP or HEIC, by content."},
        }
        required = ["images"] if predictor.needs_image else []
    names = ", ".join(field.name for field in predictor.fields) or "none"
    properties["metadata"] = {
        "type": "string",
        "contentMediaType": "application/json",
        "maxLength": settings.max_metadata,
        "description": f"A JSON object of any of the model's fields ({names}); others are missing.",
    }
    if explained:
        properties["label"] = {
            "type": "string",
            "enum": list(predictor.classes),
            "description": "Class to explain; default: the predicted one.",
        }
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI, settings: ServiceSettings) -> dict[str, Any]:
    openapi = get_openapi(title=app.title, version=app.version, description=NOTICE, routes=app.routes)
    if settings.root_path:
        openapi["servers"] = [{"url": settings.root_path}]
    response_id = {
        "description": "Identifies the request in the log.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9-]{1,64}$"},
    }
    # Any text may be sent; one that doesn't match the pattern is replaced.
    request_id = {
        "name": "X-Request-ID",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "Your own id of the request.",
    }
    headers: dict[str, dict[str, Any]] = {
        "401": {"WWW-Authenticate": {"schema": {"type": "string"}}},
        "429": {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
    }
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [*operation.get("parameters", []), request_id]
            for status, response in operation["responses"].items():
                response["headers"] = {"X-Request-ID": response_id, **headers.get(status, {})}
            if settings.api_keys and path not in PROBES:
                operation["security"] = [{"key": []}, {"bearer": []}]
    if settings.api_keys:
        openapi.setdefault("components", {})["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
    return openapi
