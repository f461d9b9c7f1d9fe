"""The routes of the web service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import dualrefnet
from dualrefnet.deploy.predictor import refuse_shortcut
from dualrefnet.service import schemas
from dualrefnet.service.inference import Inference, Reservation
from dualrefnet.service.middleware import Guard
from dualrefnet.service.observability import Metrics
from dualrefnet.service.settings import ServiceSettings
from dualrefnet.service.uploads import read_upload

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Predictor

Result = TypeVar("Result")
# Nothing inline, nothing from elsewhere; the page shows the chosen files (blob:) and saliency maps (data:).
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# These hold nothing of the model and need no key: they ask for it, and send it with their requests.
DOCS_FILES = {"/docs": "docs.html", "/docs.js": "docs.js", "/page.css": "page.css"}
PAGE_FILES = {"/": "page.html", "/page.js": "page.js"}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def create_app(predictor: Predictor, settings: ServiceSettings, explainer: Predictor | None = None) -> FastAPI:
    """Return the service as an ASGI application; with an `explainer` explanations don't delay predictions."""
    refuse_shortcut(predictor.shortcut, predictor.name, settings.accept_missingness_shortcut)
    metrics = Metrics()
    inference = Inference(predictor, settings, metrics, explainer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        inference.start()
        try:
            yield
        finally:
            await inference.stop()

    app = FastAPI(
        title=f"dualrefnet: {predictor.name}",
        version=dualrefnet.__version__,
        # FastAPI's own documentation pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A redirect would repeat the host that the client has named.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.inference = inference
    files = {**DOCS_FILES, **(PAGE_FILES if settings.page else {})}
    app.add_middleware(
        Guard, settings=settings, metrics=metrics, inference=inference, open_paths=frozenset({*schemas.PROBES, *files})
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    app.add_exception_handler(HTTPException, _http_error)
    app.openapi = lambda: schemas.describe(app, settings)  # type: ignore[method-assign]
    _add_prediction_routes(app, inference)
    _add_information_routes(app, inference, metrics)
    for path, name in files.items():
        _add_file(app, path, Path(__file__).with_name(name))
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """Give a wrong path or method the form of all errors."""
    assert isinstance(error, HTTPException)
    code, message = {
        404: ("not_found", "there is nothing here; /docs describes what there is"),
        405: ("wrong_method", "this path takes another method; see the header Allow"),
    }.get(error.status_code, ("error", str(error.detail)))
    headers = {name: "GET, HEAD" if value == "GET" else value for name, value in (error.headers or {}).items()}
    raise schemas.Refusal(error.status_code, code, message, headers)


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    content, media_type = file.read_bytes(), MEDIA_TYPES[file.suffix]

    @app.get(path, include_in_schema=False)
    async def static() -> Response:
        return Response(content, media_type=media_type, headers={"Content-Security-Policy": PAGE_POLICY})


def _add_prediction_routes(app: FastAPI, inference: Inference) -> None:
    predictor, settings = inference.predictor, inference.settings
    responses = schemas.error_responses(schemas.PREDICTION_ROUTE, settings)

    @app.post(
        "/v1/predict",
        response_model=schemas.PredictionBody,
        responses=responses,
        openapi_extra=schemas.request_body(predictor, settings, explained=False),
    )
    async def predict(request: Request) -> Any:
        """Classify one lesion from its images and the patient's metadata."""
        with Reservation(inference.limiter, request.state.length) as reservation:
            upload = await read_upload(request, reservation, settings)
            images = len(upload.images)
            prediction = await _while_connected(request, inference.predict(upload, reservation))
        return schemas.prediction_body(prediction, predictor.name, images, request.state.request_id)

    @app.post(
        "/v1/explain",
        response_model=schemas.ExplainedBody,
        responses=responses,
        openapi_extra=schemas.request_body(predictor, settings, explained=True),
    )
    async def explain(request: Request) -> Any:
        """Classify one lesion from one image and the metadata, and explain the prediction by occlusion."""
        with Reservation(inference.explain_limiter, request.state.length) as reservation:
            upload = await read_upload(request, reservation, settings, explained=True)
            images = len(upload.images)
            prediction, explanation = await _while_connected(request, inference.explain(upload, reservation))
        body = schemas.prediction_body(prediction, predictor.name, images, request.state.request_id)
        return {**body, "explanation": schemas.explanation_body(explanation)}


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await some work, and cancel it when the client disconnects; raises ConnectionAbortedError then."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionAbortedError
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await working


def _add_information_routes(app: FastAPI, inference: Inference, counted: Metrics) -> None:
    settings = inference.settings
    responses = schemas.error_responses(schemas.ANY_ROUTE, settings)
    probe_responses = schemas.error_responses(schemas.ANY_ROUTE)

    @app.get("/v1/model", response_model=schemas.ModelBody, responses=responses)
    async def model() -> Any:
        """Describe the model, its metadata fields, and the limits of a request."""
        return schemas.model_body(inference.predictor, settings)

    @app.get("/healthz", response_model=schemas.Alive, responses=probe_responses)
    async def healthz() -> Any:
        """Whether the process lives."""
        return {"status": "alive"}

    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": schemas.ErrorBody, "description": "The model is not ready yet, or the service is busy or stops."}
    }

    @app.get("/readyz", response_model=schemas.Alive, responses={**probe_responses, **not_ready})
    async def readyz() -> Any:
        """Whether predictions can be requested."""
        if inference.readiness != "ready":
            raise schemas.Refusal(503, inference.readiness, f"not ready: {inference.readiness}", retry=True)
        return {"status": "ready"}

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}

    @app.get("/metrics", response_class=Response, responses={**responses, 200: text})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(counted.render(), media_type=CONTENT_TYPE_LATEST)
