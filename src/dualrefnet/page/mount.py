"""The page for people at `/`: a photograph and a form in, an answer and what mattered for it out."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request

from dualrefnet.errors import DataError, DualRefNetError
from dualrefnet.page import scripts as page_scripts
from dualrefnet.page.answer import answer_html, explanation_html, problem_html
from dualrefnet.page.examples import draw_examples
from dualrefnet.page.form import make_questions, read_form
from dualrefnet.page.gate import PageGate
from dualrefnet.page.layout import PHOTOGRAPHS, build_blocks
from dualrefnet.page.login import Login
from dualrefnet.page.quiet_gradio import gradio
from dualrefnet.page.upload import AROUND, Uploads, private_folder
from dualrefnet.service.batcher import Busy
from dualrefnet.service.observability import where
from dualrefnet.service.schemas import Refusal

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor
    from dualrefnet.service.settings import ServiceSettings

Ask = Callable[[list[bytes], dict[str, Any]], Awaitable["Prediction"]]
Explain = Callable[[bytes | None, dict[str, Any], str | None], Awaitable["Explanation"]]

_CSS = Path(__file__).with_name("page.css")
_LOG = logging.getLogger(__name__)
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]


class Page:
    """The page's two steps: classify, then explain.

    Args:
        predictor: the model.
        ask: classifies photographs of one lesion, such as the batcher.
        explain: explains an answer.
        uploads: the photographs that wait.
    """

    def __init__(self, predictor: Predictor, ask: Ask, explain: Explain, uploads: Uploads) -> None:
        self.predictor, self.uploads = predictor, uploads
        self.questions = make_questions(predictor)
        self._ask, self._explain = ask, explain

    async def classify(self, asked: str) -> tuple[str, str, str]:
        """Return the answer as HTML, the label to explain (empty if there is no answer), and what was asked.

        Args:
            asked: JSON of what the browser gathered: names of photographs, and the form.
        """
        try:
            photographs, form = await self._read(asked)
            if self.predictor.needs_image and not photographs:
                raise DataError("this model needs a photograph; add one and classify again")
            prediction = await self._ask(photographs, form)
        except Exception as error:
            return problem_html(_say(error)), "", asked
        return answer_html(prediction, self.predictor, self.questions, len(photographs)), prediction.label, asked

    async def explain(self, asked: str, label: str) -> tuple[str, str]:
        """Return the explanation of an answer as HTML (empty if there is none), and what was asked.

        Args:
            asked: as for `classify`.
            label: what `classify` gave.
        """
        if label not in self.predictor.classes:
            return "", asked
        try:
            photographs, form = await self._read(asked)
            first = photographs[0] if photographs else None
            explanation = await self._explain(first, form, label)
            seen = None if first is None else await to_thread.run_sync(self.predictor.prepare, first)
            told = explanation_html(explanation, seen, form, self.predictor, self.questions, len(photographs))
        except Exception as error:
            told = problem_html(_say(error), "No explanation")
        return told, asked

    async def _read(self, asked: str) -> tuple[list[bytes], dict[str, Any]]:
        """Return the photographs' bytes and the answers that were given.

        Raises:
            DataError: it isn't what the page gathers, or an answer can't be.
            ImageError: a photograph isn't there any more.
        """
        try:
            request = json.loads(asked)
            names, values = request["photographs"], request["form"]
            valid = (
                isinstance(names, list) and all(isinstance(name, str) for name in names) and isinstance(values, dict)
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid or len(names) > PHOTOGRAPHS:
            raise DataError("this isn't a request of the page; reload it")
        form = read_form(self.questions, values)
        if not self.predictor.reads_image:
            return [], form
        return [await to_thread.run_sync(self.uploads.read, name) for name in names], form


def mount_page(app: FastAPI, predictor: Predictor, ask: Ask, explain: Explain, settings: ServiceSettings) -> FastAPI:
    """Mount the page at `/` of a service; routes that the service has already go first.

    Args:
        app: the service.
        predictor: the model.
        ask: classifies photographs of one lesion with a form.
        explain: explains the answer for a photograph (or none), a form and a label.
        settings: of the service; its keys open the page, and its limits hold for photographs.

    Raises:
        DataError: the environment names a folder for photographs that others may look into.
    """
    decode = partial(predictor.decode, max_bytes=settings.max_upload, max_pixels=settings.max_pixels)
    uploads = Uploads(private_folder(), decode, settings.max_upload - AROUND)
    login = Login([key.get_secret_value() for key in settings.api_keys])
    blocks = build_blocks(Page(predictor, ask, explain, uploads), draw_examples())
    # It tells a browser whether the server is still the same one; workers are.
    blocks.app_id = 1
    app.state.page_login = login
    steps = {
        number: len(step.inputs) for number, step in blocks.fns.items() if step.api_name in ("classify", "explain")
    }
    mounted: FastAPI = gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        app_kwargs={"middleware": [Middleware(PageGate, login=login, uploads=uploads, steps=steps)]},
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=settings.max_upload - AROUND,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Base(
            primary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=[_CSS],
        js=page_scripts.ON_LOAD,
    )
    return mounted


def is_allowed(request: Request) -> bool:
    """Return whether a request may see the page that is mounted on its app."""
    login: Login | None = getattr(request.app.state, "page_login", None)
    return login is not None and login.is_allowed(request)


def _say(error: Exception) -> str:
    """Return what people are told of an error; where it is unexpected, where it happened goes to the log, and none of
    its words.
    """
    if isinstance(error, DualRefNetError | Refusal):
        return str(error)
    if isinstance(error, Busy):
        return "too many people ask at once; try again in a moment"
    _LOG.error("page failed", extra={"error": type(error).__name__, "where": where(error)})
    return "something went wrong on the server; try again, and tell its operator if it stays so"
