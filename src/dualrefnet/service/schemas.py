"""What the service answers, as pydantic models, and what OpenAPI says of its statuses."""

# also: The description of the interface for programs (OpenAPI), and the same as a page for people.

from __future__ import annotations

import base64
import hashlib
import html
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
    likely: list[str] = Field(
        description="The set of classes that holds the right one as often as was promised; empty if not calibrated."
    )
    malignancy: float | None = Field(description="Sum of the probabilities of the malignant classes; null if none is.")
    refer: bool | None = Field(
        description="Whether the malignancy reaches the referral threshold that was fitted for such inputs; null if there is none."
    )
    availability: str = Field(
        description="What was given: the group of inputs whose temperature, sets and threshold were used."
    )
    out_of_scope: float | None = Field(
        description="More than 1: the picture is unlike the photographs that the model has learned from."
    )
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
    warning: str | None = Field(
        description="Why its answers to patients with blank metadata can't be relied on; null if they can."
    )
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
    if explanation.saliency is not None:
        falls = np.clip(np.nan_to_num(np.asarray(explanation.saliency, dtype=np.float64)), 0, None)
        maximum = float(falls.max())
        stream = io.BytesIO()
        Image.fromarray(np.rint(falls * (255 / maximum if maximum > 0 else 0)).astype(np.uint8)).save(stream, "PNG")
        heat = {"png": base64.b64encode(stream.getvalue()).decode("ascii"), "maximum": maximum}
    fields = [{"name": name, "change": float(change)} for name, change in explanation.fields.items()]
    return {"label": explanation.label, "fields": fields, "heat": heat}


def error_bytes(code: str, message: str, request_id: str) -> bytes:
    """Return the body of an answer that says what went wrong."""
    return json.dumps({"error": {"code": code, "message": message, "request_id": request_id}}).encode()


ANY_ROUTE = {
    400: "What was sent isn't HTTP as it should be.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    431: "The lines before the body are too large.",
    500: "The service made a mistake.",
    503: "The service has too many connections.",
}


QUESTION = {
    400: "The request isn't well-formed: not multipart, not strict JSON, a part of an unknown name, or too many parts.",
    408: "The request came too slowly.",
    413: "The request, or a part of it, is too large.",
    415: "The request isn't multipart/form-data.",
    422: "A photograph can't be read, or the form doesn't suit the model.",
    429: "Too many requests are waiting; ask again after Retry-After seconds.",
    431: "The lines before the body are too large.",
    500: "The service made a mistake.",
    503: "The service didn't manage in time, or has too many connections; ask again after Retry-After seconds.",
}


NO_KEY = "No API key was named, or a wrong one."


STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font-family:monospace;overflow-wrap:anywhere;white-space:pre-wrap}td,th{text-align:left;padding:.1rem .8rem .1rem 0}"
)


GUIDE_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def errors(statuses: dict[int, str], with_key: bool) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` for some statuses."""
    told = {**statuses, **({401: NO_KEY} if with_key else {})}
    return {status: {"model": ErrorBody, "description": told[status]} for status in sorted(told)}


def question_body(predictor: Predictor, settings: ServiceSettings, *, explained: bool) -> dict[str, Any]:
    """Return the description of a request's body."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    if predictor.reads_image:
        properties["images"] = {
            "type": "array",
            "description": "A photograph of the lesion." if explained else "Photographs of one lesion.",
            "minItems": 1,
            "maxItems": 1 if explained else settings.max_images,
            "items": {
                "type": "string",
                "format": "binary",
                "description": "JPEG, PNG, BMP, TIFF or WebP; told by the content.",
            },
        }
        required = ["images"] if predictor.needs_image else []
    names = ", ".join(field.name for field in predictor.fields) or "none"
    properties["metadata"] = {
        "type": "string",
        "contentMediaType": "application/json",
        "maxLength": settings.max_metadata,
        "description": f"A JSON object of any of the model's fields ({names}); what is absent is missing.",
    }
    if explained:
        properties["label"] = {
            "type": "string",
            "enum": list(predictor.classes),
            "description": "Class to explain; default: the likeliest.",
        }
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI, settings: ServiceSettings) -> dict[str, Any]:
    """Return the OpenAPI description of the service."""
    found = get_openapi(title=app.title, version=app.version, description=NOTICE, routes=app.routes)
    named = {
        "description": "Names the request in the log.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9-]{1,64}$"},
    }
    # Any text may be sent; what isn't of the pattern is replaced.
    asked = {
        "name": "X-Request-ID",
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "Your own name of it.",
    }
    more: dict[str, dict[str, Any]] = {
        "401": {"WWW-Authenticate": {"schema": {"type": "string"}}},
        "429": {"Retry-After": {"schema": {"type": "integer", "minimum": 0}}},
    }
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["parameters"] = [*operation.get("parameters", []), asked]
            for status, response in operation["responses"].items():
                response["headers"] = {"X-Request-ID": named, **more.get(status, {})}
            if settings.api_keys and path not in ("/healthz", "/readyz"):
                operation["security"] = [{"key": []}, {"bearer": []}]
    if settings.api_keys:
        found.setdefault("components", {})["securitySchemes"] = {
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "bearer": {"type": "http", "scheme": "bearer"},
        }
    return found


def guide(found: dict[str, Any], root_path: str) -> str:
    """Return the description as a page: ready-made viewers load their programs from elsewhere, which the service
    forbids.
    """
    parts = [f"<h1>{_text(found['info']['title'])}</h1><p>{_text(NOTICE)}</p>"]
    parts.append(f'<p>For programs: <a href="{_text(root_path)}/openapi.json">openapi.json</a></p>')
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            parts.append(
                f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation.get('description', ''))}</p>"
            )
            content = operation.get("requestBody", {}).get("content", {})
            for schema in (item["schema"] for item in content.values()):
                cells = [(name, item.get("description", "")) for name, item in schema["properties"].items()]
                parts.append(_table(("part", "what"), cells))
                files = "-F images=@photograph.jpg " if "images" in schema["properties"] else ""
                parts.append(f"<pre>curl {files}-F metadata='{{}}' http://HOST:PORT{_text(root_path + path)}</pre>")
            parts.append(
                _table(
                    ("status", "meaning"),
                    [(status, item["description"]) for status, item in operation["responses"].items()],
                )
            )
    title = _text(found["info"]["title"])
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><body>'
    return head + "".join(parts) + "</body></html>"


def _table(names: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    cells = "".join(f"<tr><td><code>{_text(left)}</code></td><td>{_text(right)}</td></tr>" for left, right in rows)
    return f"<table><tr>{head}</tr>{cells}</table>"


def _text(text: str) -> str:
    return html.escape(str(text))
