"""The page in a browser, on a phone and on a desktop."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import SecretStr

from dualrefnet.data.pad_ufes_20 import FIELDS
from dualrefnet.run import Run
from dualrefnet.runtime.prediction import Prediction
from live_service import QUICK, StandInPredictor, live

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
WITH_PAGE = QUICK.model_copy(update={"page": True})
KEY = "a-key-of-some-length"
SHORTCUT = "with missing metadata it refers fewer cancers"


class PageModel(StandInPredictor):
    """A stand-in with PAD-UFES-20's fields; black images are out of distribution."""

    fields = FIELDS
    decision = SimpleNamespace(field_effects={"diameter_1": 0.4, "itch": 0.3, "region": 0.2, "age": 0.1})
    shortcut = SHORTCUT

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def categories(self, name: str) -> tuple[str, ...]:
        return ("FACE", "LOWER_ARM") if name == "region" else ("unused",)

    def answer(self, lesion: Any, form: Any) -> Prediction:
        self.seen.append((len(lesion), dict(form)))
        dark = lesion[0] is not None and lesion[0].mean() < 10
        found = super().answer(lesion, form)
        return replace(found, out_of_scope=2.0 if dark else 0.5, availability="image, 67-100% of fields")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model() -> PageModel:
    return PageModel()


@pytest.fixture(scope="module")
def address(model: PageModel) -> Iterator[str]:
    with live(model, WITH_PAGE.model_copy(update={"accept_missingness_shortcut": True})) as client:
        yield str(client.base_url)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, grey in (("lesion.jpg", 200), ("black.png", 0)):
        Image.fromarray(np.full((120, 90, 3), grey, np.uint8)).save(folder / name)
    (folder / "text.jpg").write_text("not an image")
    return folder


@pytest.fixture(params=["phone", "desktop"])
def page(request: pytest.FixtureRequest, chromium: Any, address: str) -> Iterator[Any]:
    """A page that requests nothing from elsewhere, and that nothing is wrong with."""
    phone = request.param == "phone"
    context = chromium.new_context(
        viewport=PHONE if phone else DESKTOP, has_touch=phone, is_mobile=phone, reduced_motion="reduce"
    )
    found = context.new_page()
    problems: list[str] = []
    found.on("request", lambda one: one.url.startswith((address, "data:", "blob:")) or problems.append(one.url))
    found.on("pageerror", lambda error: problems.append(str(error)))
    found.on("console", lambda message: "Content Security" in message.text and problems.append(message.text))
    found.goto(address)
    found.wait_for_selector("#field-age", state="attached")
    yield found
    assert found.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
    assert problems == []


def classify(page: Any, *images: Path) -> str:
    page.set_input_files("#files", images)
    page.click("#submit")
    page.wait_for_selector("#result .prediction")
    return str(page.inner_text("#result"))


def test_an_image_and_metadata_give_a_prediction_and_an_explanation(page: Any, model: PageModel, files: Path) -> None:
    assert SHORTCUT in page.inner_text("#shortcut").lower()
    assert page.locator("label.camera").is_visible() == (page.viewport_size["width"] == 390)
    first = page.eval_on_selector_all("#first-fields [name]", "all => all.map((e) => e.name)")
    assert (first[:4], len(first)) == (["diameter_1", "itch", "region", "age"], 8)
    page.fill("#field-age", "61,5")
    page.select_option("#field-itch", "true")
    page.select_option("#field-region", label="Lower arm")
    text = classify(page, files / "lesion.jpg", files / "lesion.jpg")
    assert model.seen[-1] == (2, {"age": 61.5, "itch": True, "region": "LOWER_ARM"})
    for part in (
        "Basal cell carcinoma",
        "78%",
        "2 images",
        "Prediction set",
        "Referral advised",
        "67-100%",
        "Age 61.5",
    ):
        assert part in text
    page.click("#result button")
    page.wait_for_selector("#explanation canvas")
    assert page.locator("#explanation tbody tr").count() == 3
    assert "+12.5" in page.inner_text("#explanation")
    bright = (
        "(e) => { const d = e.getContext('2d').getImageData(0, 0, 480, 480).data; return [d[0], d[d.length - 4]]; }"
    )
    low, high = page.eval_on_selector("#explanation canvas", bright)
    assert low == 200
    assert high > 200
    # Changed input makes the result stale; a reset forgets everything.
    page.select_option("#field-itch", "false")
    page.wait_for_selector("#result.stale")
    page.click("#reset")
    assert not page.locator("#result, #explanation").locator("visible=true").count()
    assert page.locator("#previews img").count() == 0
    assert page.input_value("#field-age") == ""


def test_the_button_is_busy_until_the_result_and_the_result_is_in_view(page: Any, files: Path) -> None:
    page.evaluate(
        "window.fetch = ((real) => (...all) => new Promise((done) => setTimeout(done, 400)).then(() => real(...all)))(fetch)"
    )
    idle = page.inner_text("#submit")
    page.set_input_files("#files", files / "lesion.jpg")
    page.click("#submit")
    assert page.is_disabled("#submit")
    assert page.inner_text("#submit") != idle
    page.wait_for_selector("#result .prediction")
    assert page.is_enabled("#submit")
    assert page.inner_text("#submit") == idle
    page.wait_for_function("document.querySelector('#result h2').getBoundingClientRect().top >= 0")
    uncovered = (
        "(e) => { const at = e.getBoundingClientRect(); "
        "return e.contains(document.elementFromPoint(at.left + 5, at.top + 5)); }"
    )
    assert page.eval_on_selector("#result h2", uncovered)


def test_errors_are_in_plain_words_and_the_page_goes_on(page: Any, files: Path) -> None:
    page.click("#submit")
    page.wait_for_selector("#error:has-text('Choose at least one image')")
    page.set_input_files("#files", files / "text.jpg")
    page.click("#submit")
    page.wait_for_selector("#error:has-text('JPEG')")
    page.click("#previews button")
    page.fill("#field-age", "610")
    page.set_input_files("#files", files / "black.png")
    page.click("#submit")
    page.wait_for_selector("#error:has-text('from 0 to 120')")
    assert page.evaluate("document.activeElement.id") == "field-age"
    page.fill("#field-age", "61")
    assert "Do not rely on this prediction" in classify(page)
    assert page.inner_text("#error") == ""


def test_the_page_works_by_keyboard_and_everything_has_a_name(page: Any, model: PageModel, files: Path) -> None:
    page.set_input_files("#files", files / "lesion.jpg")
    page.focus("#files")
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        if reached[-1] == "field-itch":
            page.keyboard.press("y")
        if reached[-1] == "field-age":
            page.keyboard.type("44")
            page.keyboard.press("Enter")
            break
    page.wait_for_selector("#result .prediction")
    assert model.seen[-1][1] == {"itch": True, "age": 44}
    assert page.evaluate("document.activeElement.id") == "result"
    page.click("summary")
    nameless = (
        "all => all.filter((e) => !(e.ariaLabel || e.labels?.length || e.innerText?.trim())).map((e) => e.outerHTML)"
    )
    assert page.eval_on_selector_all("input, select, button, summary, section, table", nameless) == []
    assert page.eval_on_selector_all("img", "all => all.every((e) => e.alt)")
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map((e) => Number(e.tagName[1]))")
    assert all(after - before <= 1 for before, after in pairwise(levels))
    small = "all => all.filter((e) => e.offsetParent && e.getBoundingClientRect().height < 42).map((e) => e.outerHTML)"
    assert page.eval_on_selector_all("button, .button, summary, select, input:not([type=file])", small) == []


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(chromium: Any) -> None:
    with live(StandInPredictor(), WITH_PAGE.model_copy(update={"api_keys": (SecretStr(KEY),)})) as client:
        context = chromium.new_context(viewport=PHONE)
        page = context.new_page()
        page.goto(str(client.base_url))
        page.wait_for_selector("#login")
        for key, found in (("wrong-key-of-some-length", "#login-error:has-text('not accepted')"), (KEY, "#field-age")):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_selector(found)
        page.reload()
        page.wait_for_selector("#field-age")
        assert context.cookies() == []
        assert page.evaluate("localStorage.length") == 0
        page.goto(f"{client.base_url}/docs")
        page.wait_for_selector("text=POST /v1/predict")
        context.close()


def test_the_static_files_need_no_key_and_allow_nothing_inline_or_from_elsewhere() -> None:
    with live(StandInPredictor(), WITH_PAGE.model_copy(update={"api_keys": (SecretStr(KEY),)})) as client:
        for path in ("/", "/page.js", "/page.css", "/docs", "/docs.js"):
            response = client.get(path)
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert "set-cookie" not in response.headers
            assert not [url for url in ("http://", "https://", "@import") if url in response.text]
    with live(settings=QUICK) as client:
        assert client.get("/").status_code == client.get("/page.js").status_code == 404


@pytest.mark.slow
def test_a_trained_model_predicts_and_explains_on_its_page(chromium: Any, tiny_run: Run, sample_root: Path) -> None:
    from dualrefnet.deploy.predictor import Predictor

    predictor = Predictor.load(tiny_run)
    image = next((sample_root / "images").iterdir())
    with live(predictor, WITH_PAGE.model_copy(update={"accept_missingness_shortcut": True})) as client:
        page = chromium.new_page(viewport=DESKTOP)
        page.goto(str(client.base_url))
        page.wait_for_selector("#field-age", state="attached")
        page.click("summary") if page.locator("#field-age").is_hidden() else None
        page.fill("#field-age", "61")
        text = classify(page, image)
        expected = predictor.predict(image, {"age": 61})
        assert f"{round(100 * expected.probabilities[expected.label])}%" in text
        page.click("#result button")
        page.wait_for_selector("#explanation canvas", timeout=60_000)
        assert page.locator("#explanation tbody tr").count() == 1
        assert httpx.get(f"{client.base_url}/v1/model").json()["name"] in page.inner_text("header")
        page.close()
