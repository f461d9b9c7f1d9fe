"""The web service's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import dualrefnet
from dualrefnet.errors import DependencyError

try:
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError:
    raise DependencyError("the web service needs FastAPI: pip install 'dualrefnet[deploy]'") from None

from dualrefnet.deploy.predictor import refuse_shortcut
from dualrefnet.service.answering import Answering, unless_gone
from dualrefnet.service.middleware import Guard
from dualrefnet.service.observability import Observed
from dualrefnet.service.schemas import (
    ANY_ROUTE,
    GUIDE_POLICY,
    NOTICE,
    QUESTION,
    Alive,
    ErrorBody,
    ExplainedBody,
    FieldBody,
    LimitsBody,
    ModelBody,
    PredictionBody,
    Refusal,
    describe,
    error_bytes,
    errors,
    explanation_body,
    guide,
    prediction_body,
    question_body,
)
from dualrefnet.service.settings import ServiceSettings
from dualrefnet.service.uploads import read_upload

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Predictor


Answers = dict[int | str, dict[str, Any]]


def create_app(predictor: Predictor, settings: ServiceSettings, explainer: Predictor | None = None) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        predictor: the model.
        settings: limits, keys and so on.
        explainer: a second copy of the model, so that explanations don't hold predictions up; see `Answering`.

    Raises:
        DependencyError: the page is wanted and Gradio isn't installed.
        RunError: the model mustn't be served; see `refuse_shortcut`.
    """
    refuse_shortcut(predictor.shortcut, predictor.name, settings.accept_missingness_shortcut)
    observed = Observed()
    service = Answering(predictor, settings, observed, explainer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title=f"dualrefnet: {predictor.name}",
        version=dualrefnet.__version__,
        # Their pages load programs from elsewhere.
        docs_url=None,
        redoc_url=None,
        # A redirect would name the host that the client has named.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings, observed=observed, standing=service.standing)
    app.add_exception_handler(HTTPException, _not_found)
    app.openapi = lambda: describe(app, settings)  # type: ignore[method-assign]
    _add_questions(app, service)
    _add_facts(app, service, observed)
    for path in ("/v1/predict", "/v1/explain"):
        app.router.routes.append(Route(path, OtherMethod("POST"), include_in_schema=False))
    for path in ("/v1/model", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        app.router.routes.append(Route(path, OtherMethod("GET"), include_in_schema=False))
    if settings.page:
        from dualrefnet.page.mount import mount_page

        app = mount_page(app, predictor, service.ask, service.ask_why, settings)
    return app


class OtherMethod:
    """Answers a path of the interface that was asked with another method; the page, which takes any path, would say
    404.
    """

    def __init__(self, allowed: str) -> None:
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse."""
        raise HTTPException(405, headers={"Allow": self._allowed})


async def _not_found(request: Request, error: Exception) -> Response:
    """Answer a wrong path or method in the form of all errors."""
    assert isinstance(error, HTTPException)
    code, message = {
        404: ("not_found", "there is nothing here; /docs tells what there is"),
        405: ("wrong_method", "this path takes another method; the header Allow names it"),
    }.get(error.status_code, ("error", str(error.detail)))
    headers = dict(error.headers or {})
    return Response(error_bytes(code, message, _id(request)), error.status_code, headers, "application/json")


def _id(request: Request) -> str:
    return str(request.state.request_id)


def _add_questions(app: FastAPI, service: Answering) -> None:
    """Add the routes that ask the model."""
    predictor, settings = service.predictor, service.settings
    with_key = bool(settings.api_keys)

    async def gone(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    @app.post(
        "/v1/predict",
        response_model=PredictionBody,
        responses=errors(QUESTION, with_key),
        openapi_extra=question_body(predictor, settings, explained=False),
    )
    async def predict(request: Request) -> Any:
        """Classify one lesion from its photographs and the patient's metadata."""
        with service.place(service.room) as place:
            upload = await read_upload(
                request, place, max_images=settings.max_images, max_metadata=settings.max_metadata
            )
            prediction = await unless_gone(lambda: gone(request), service.predict(upload.images, upload.form, place))
        return prediction_body(prediction, predictor.name, len(upload.images), _id(request))

    @app.post(
        "/v1/explain",
        response_model=ExplainedBody,
        responses=errors(QUESTION, with_key),
        openapi_extra=question_body(predictor, settings, explained=True),
    )
    async def explain(request: Request) -> Any:
        """Classify one lesion from one photograph and the metadata, and tell what the answer hangs on."""
        with service.place(service.explain_room) as place:
            upload = await read_upload(
                request, place, max_images=1, max_metadata=settings.max_metadata, with_label=True
            )
            image = upload.images[0] if upload.images else None
            work = service.explain(image, upload.form, upload.label, place)
            prediction, explanation = await unless_gone(lambda: gone(request), work)
        body = prediction_body(prediction, predictor.name, len(upload.images), _id(request))
        return {**body, "explanation": explanation_body(explanation)}


def _add_facts(app: FastAPI, service: Answering, observed: Observed) -> None:
    """Add the routes that tell what the model and the service are."""
    predictor, settings = service.predictor, service.settings
    with_key = bool(settings.api_keys)
    told = errors(ANY_ROUTE, with_key)

    @app.get("/v1/model", response_model=ModelBody, responses=told)
    async def model() -> Any:
        """Tell what the model is, what it asks, and what a request may be at most."""
        effects = predictor.decision.field_effects if predictor.decision is not None else {}
        fields = [
            FieldBody(
                name=field.name,
                kind=field.kind,
                unit=field.unit,
                minimum=field.minimum,
                maximum=field.maximum,
                description=field.description,
                levels=list(predictor.categories(field.name)) if field.kind == "categorical" else [],
                effect=effects.get(field.name),
            )
            for field in predictor.fields
        ]
        limits = LimitsBody(
            bytes=settings.max_upload,
            pixels=settings.max_pixels,
            images=settings.max_images,
            metadata_bytes=settings.max_metadata,
        )
        return ModelBody(
            name=predictor.name,
            title=predictor.title,
            classes=list(predictor.classes),
            class_names=predictor.class_names,
            malignant=list(predictor.malignant),
            fields=fields,
            reads_image=predictor.reads_image,
            needs_image=predictor.needs_image,
            size=predictor.size,
            limits=limits,
            description=predictor.description,
            warning=predictor.shortcut,
            notice=NOTICE,
        )

    @app.get("/healthz", response_model=Alive, responses=errors(ANY_ROUTE, False))
    async def healthz() -> Any:
        """Tell that the process lives."""
        return {"status": "alive"}

    not_ready: Answers = {503: {"model": ErrorBody, "description": "The model isn't there yet, or the service stops."}}

    @app.get("/readyz", response_model=Alive, responses={**errors(ANY_ROUTE, False), **not_ready})
    async def readyz() -> Any:
        """Tell whether requests will be answered soon."""
        if service.standing.state != "ready":
            raise Refusal(503, service.standing.state, f"not ready: {service.standing.state}", {"Retry-After": "1"})
        return {"status": "ready"}

    plain: Answers = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
    }

    @app.get("/metrics", response_class=Response, responses={**told, **plain})
    async def metrics() -> Response:
        """Tell what was counted, for Prometheus."""
        return Response(observed.page(), media_type=observed.content_type)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Show the description of the interface."""
        return HTMLResponse(guide(app.openapi(), settings.root_path), headers={"Content-Security-Policy": GUIDE_POLICY})
