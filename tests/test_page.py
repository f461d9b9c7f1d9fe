"""The page in a browser, on a phone and on a desk."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import DESK, PHONE, StandIn, browser, mounted, served
from dualrefnet.run import Run
from dualrefnet.service.settings import ServiceSettings

pytest.importorskip("gradio")
pytest.importorskip("fastapi")

NOTICE = "For research. Not a medical device. Not a diagnosis."
ANSWER, EXPLANATION = "#answer .answer.given", "#explanation .changes"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def model() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def address(model: StandIn) -> Iterator[str]:
    with served(mounted(model)) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pixels = np.full((120, 90, 3), 90, np.uint8)
    Image.fromarray(pixels).save(folder / "lesion.jpg")
    Image.fromarray(np.zeros_like(pixels)).save(folder / "black.png")
    (folder / "text.jpg").write_text("I am a text")
    stream = io.BytesIO()
    Image.effect_noise((90, 90), 60).save(stream, "JPEG")
    (folder / "broken.jpg").write_bytes(stream.getvalue()[:700])
    return folder


class Visit:
    """A page with what it asked for and complained of."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#classify")
        page.wait_for_function("document.querySelector('#question-itch')?.hasAttribute('aria-label')")

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def choose(self, file: Path, number: int = 1) -> None:
        self.page.set_input_files(f"#photograph-{number} input[type=file]", file)

    def classify(self) -> str:
        self.page.click("#classify")
        self.page.wait_for_selector(ANSWER)
        return str(self.page.inner_text("#answer"))


@pytest.fixture(scope="module")
def contexts(chromium: Any) -> Iterator[dict[str, Any]]:
    """One for each kind of device, which keeps what it has loaded."""
    found = {
        "phone": chromium.new_context(viewport=PHONE, has_touch=True, is_mobile=True, reduced_motion="reduce"),
        "desk": chromium.new_context(viewport=DESK, reduced_motion="reduce"),
    }
    yield found
    for context in found.values():
        context.close()


@pytest.fixture
def visit(request: pytest.FixtureRequest, contexts: dict[str, Any], address: str) -> Iterator[Visit]:
    """A new page on a phone, or on what the test asks for."""
    found = Visit(contexts[getattr(request, "param", "phone")].new_page(), address)
    yield found
    found.page.close()
    assert found.elsewhere == []
    assert found.complaints == []


everywhere = pytest.mark.parametrize("visit", ["phone", "desk"], indirect=True)


def width(page: Any) -> tuple[int, int]:
    return page.evaluate("document.documentElement.scrollWidth"), page.evaluate("window.innerWidth")


@everywhere
def test_a_photograph_and_some_answers_become_an_answer_and_an_explanation(
    visit: Visit, model: StandIn, files: Path
) -> None:
    page = visit.page
    unknown = "[...document.querySelectorAll('fieldset')].map((e) => e.querySelector('input[value=\"\"]').checked)"
    assert page.evaluate(unknown) == [True] * 6
    assert page.locator("#camera").is_visible() == (page.viewport_size["width"] == 390)
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    page.fill("#question-age input, #question-age textarea", "61")
    page.click("#question-itch input[value=yes]")
    page.click("#question-grew input[value=no]")
    page.click("#question-region input")
    page.click("#question-region [role=option]:has-text('Face')")
    text = visit.classify()
    assert model.seen[-1][1] == {"age": 61.0, "itch": True, "grew": False, "region": "FACE"}
    assert "Melanoma" in text
    assert "With 90% coverage the answer is one of" in text
    assert NOTICE in text
    assert page.locator("#answer tbody tr").count() == 6
    page.wait_for_selector(EXPLANATION)
    assert page.locator("#explanation img").count() == 3
    assert page.locator("#explanation tbody tr").count() == 4
    assert "percentage points" in page.inner_text("#explanation")
    shown, window = width(page)
    assert shown <= window
    box = page.locator("#answer").bounding_box()
    assert box["y"] < page.viewport_size["height"] / 2, "the answer is brought into sight"
    assert page.locator("#notice").bounding_box()["y"] >= 0, "the notice stays in sight"


def test_a_changed_form_makes_the_answer_old_and_clear_forgets_everything(visit: Visit, files: Path) -> None:
    page = visit.page
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    page.fill("#question-age input, #question-age textarea", "61")
    page.click("#question-itch input[value=yes]")
    visit.classify()
    page.wait_for_selector(EXPLANATION)
    assert "stale" not in page.get_attribute("#told", "class")
    page.click("#question-itch input[value=no]")
    page.wait_for_selector("#told.stale")
    page.click("#clear")
    page.wait_for_selector("#photograph-1 input[type=file]", state="attached")
    page.wait_for_function("!document.querySelector('#answer .given')")
    assert page.locator("#photograph-1 img").count() == 0
    assert page.input_value("#question-age input, #question-age textarea") == ""
    assert page.is_checked("#question-itch input[value='']")
    assert page.inner_text("#explanation").strip() == ""
    assert page.locator("#photograph-1 button").first.is_visible()


@pytest.mark.parametrize(
    ("name", "message"), [("text.jpg", "isn't a JPEG, PNG"), ("broken.jpg", "damaged or truncated")]
)
def test_what_isnt_a_photograph_is_said_plainly(visit: Visit, files: Path, name: str, message: str) -> None:
    page = visit.page
    visit.choose(files / name)
    page.wait_for_selector("[data-testid=toast-text]")
    page.wait_for_function("!document.querySelector('[data-testid=toast-text]').textContent.startsWith('HTTP')")
    said = page.inner_text("[data-testid=toast-text]")
    assert message in said
    assert "HTTP" not in said
    assert page.locator("[data-testid=toast-body]").first.get_attribute("role") == "status"
    assert page.locator("#photograph-1 img").count() == 0
    # The page goes on.
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    assert "Melanoma" in visit.classify()


def test_without_a_photograph_or_with_an_odd_number_the_page_says_what_to_do(visit: Visit, files: Path) -> None:
    page = visit.page
    page.click("#classify")
    page.wait_for_selector("#answer .problem")
    assert "needs a photograph" in page.inner_text("#answer")
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    page.fill("#question-age input, #question-age textarea", "610")
    page.click("#classify")
    page.wait_for_selector("#answer .problem:has-text('0 to 120 years')")
    assert page.inner_text("#explanation").strip() == ""


def test_a_picture_out_of_scope_is_hard_to_miss(visit: Visit, files: Path) -> None:
    visit.choose(files / "black.png")
    visit.page.wait_for_selector("#photograph-1 img")
    assert "Don't rely on the answer" in visit.classify()
    alarm = visit.page.locator("#answer .alarm")
    assert alarm.is_visible()
    # Both places at one moment: the page may still be scrolling to the answer.
    tops = "(names) => names.map((name) => document.querySelector(name).getBoundingClientRect().top)"
    above, below = visit.page.evaluate(tops, ["#answer .alarm", "#answer .likeliest"])
    assert above < below


def test_each_example_can_be_tried_and_is_called_drawn(visit: Visit, model: StandIn) -> None:
    page = visit.page
    assert "not clinical" in page.inner_text("#examples-title")
    ages = []
    for number in (1, 2, 3):
        page.click(f"#example-{number}")
        page.wait_for_selector(f"#photograph-1 img[src*='example-{number}.png']")
        visit.classify()
        page.wait_for_function("document.querySelector('#explanation .changes')")
        ages.append(model.seen[-1][1]["age"])
        assert len(model.seen[-1][1]) == 13
    assert ages == [59.0, 68.0, 31.0]


def test_more_photographs_of_a_lesion_are_read_together(visit: Visit, model: StandIn, files: Path) -> None:
    page = visit.page
    visit.choose(files / "lesion.jpg")
    page.click("#more > button")
    page.wait_for_selector("#more > button[aria-expanded=true]")
    page.wait_for_selector("#photograph-2 input[type=file]", state="attached")
    visit.choose(files / "lesion.jpg", 2)
    page.wait_for_selector("#photograph-1 img")
    page.wait_for_selector("#photograph-2 img")
    assert "2 photographs were read as one lesion" in visit.classify()
    assert len(model.seen[-1][0]) == 2


def test_an_answer_that_comes_after_the_page_was_cleared_isnt_shown(visit: Visit, files: Path) -> None:
    page = visit.page
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    waiting: list[Any] = []
    page.route("**/gradio_api/run/**", lambda route: waiting.append(route))
    page.click("#classify")
    page.wait_for_selector("#answer .waiting")
    page.click("#clear")
    page.wait_for_function("!document.querySelector('#answer .waiting')")
    with page.expect_response("**/gradio_api/run/**"):
        waiting[0].continue_()
    page.wait_for_timeout(300)
    assert page.locator(ANSWER).count() == 0
    assert page.inner_text("#explanation").strip() == ""


@pytest.mark.parametrize("visit", ["desk"], indirect=True)
def test_the_page_can_be_used_without_a_pointer(visit: Visit, model: StandIn) -> None:
    page = visit.page
    reached: dict[str, int] = {}
    where = "(() => { const e = document.activeElement; return (e.closest('[id^=question-],#photograph-1,#more,#rest') ?? e).id; })()"
    for number in range(25):
        page.keyboard.press("Tab")
        name = page.evaluate(where)
        if name in reached:
            continue
        reached[name] = number
        style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert style == "solid" or name == "", name
        if name == "question-age":
            page.keyboard.type("44")
        elif name == "question-region":
            page.wait_for_selector("#question-region [role=option].active")
            page.keyboard.press("ArrowDown")
            page.wait_for_selector("#question-region [role=option].active[aria-label=Arm]")
            page.keyboard.press("Enter")
            page.wait_for_function("document.querySelector('#question-region input').value === 'Arm'")
        elif name == "question-itch":
            page.keyboard.press("ArrowRight")
        elif name == "example-3":
            break
    wanted = [
        "photograph-1",
        "more",
        "question-age",
        "question-region",
        "question-itch",
        "question-elevation",
        "rest",
        "clear",
        "classify",
    ]
    assert [name for name in reached if name in wanted] == wanted
    assert page.is_checked("#question-itch input[value=yes]")
    assert page.input_value("#question-region input") == "Arm"
    assert page.input_value("#question-age input, #question-age textarea") == "44"
    page.keyboard.press("Enter")
    page.wait_for_selector("#photograph-1 img")
    page.focus("#classify")
    page.keyboard.press("Enter")
    page.wait_for_selector(ANSWER)
    assert model.seen[-1][1]["age"] == 31.0
    assert page.evaluate("document.activeElement.id") == "classify", "the focus stays"


@everywhere
def test_everything_has_a_name_and_headings_have_an_order(visit: Visit, files: Path) -> None:
    page = visit.page
    page.click("#rest > button")
    page.click("#question-smoke input[value=yes]")
    visit.choose(files / "lesion.jpg")
    page.wait_for_selector("#photograph-1 img")
    visit.classify()
    page.wait_for_selector(EXPLANATION)
    assert page.evaluate("[document.documentElement.lang, document.title]") == ["en", "Skin lesion classifier"]
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, select, button, summary, [role=combobox]')].filter((e) =>
          e.offsetParent && !(e.getAttribute('aria-label') || e.labels?.length || e.innerText?.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    groups = page.evaluate("[...document.querySelectorAll('fieldset')].map((e) => e.getAttribute('aria-label'))")
    assert "Does it itch?" in groups
    assert all(groups)
    assert page.evaluate("[...document.querySelectorAll('img')].filter((e) => !e.hasAttribute('alt')).length") == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for name in ("#answer", "#explanation"):
        assert (
            page.locator(
                f"{name} [aria-live=polite][role=region][aria-label], {name}[aria-live=polite][role=region]"
            ).count()
            == 1
        )
    small = page.evaluate(
        """[...document.querySelectorAll('button, summary, fieldset.choice label, .questions input:not([type=radio])')].filter((e) =>
          e.offsetParent && e.getBoundingClientRect().height < 42).map((e) => e.outerHTML.slice(0, 200))"""
    )
    assert small == []


CONTRAST = """(() => {
  const number = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (e) => { for (; e; e = e.parentElement) { const c = number(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('.gradio-container *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetParent || e.closest('.unseen, .sr-only')) continue;
    const [a, b] = [light(number(getComputedStyle(e).color)), light(back(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.textContent.trim().slice(0, 30), Math.round(ratio * 10) / 10]);
  }
  return bad;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_told_from_what_is_behind_them(chromium: Any, address: str, files: Path, scheme: str) -> None:
    context = chromium.new_context(viewport=PHONE, color_scheme=scheme, reduced_motion="reduce")
    visit = Visit(context.new_page(), address)
    visit.choose(files / "black.png")
    visit.page.wait_for_selector("#photograph-1 img")
    visit.page.click("#question-itch input[value=yes]")
    visit.classify()
    visit.page.wait_for_selector(EXPLANATION)
    assert visit.page.evaluate(CONTRAST) == []
    assert visit.page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    context.close()


def test_a_key_is_asked_for_once(chromium: Any) -> None:
    with served(mounted(StandIn(), api_keys=("a key of some length",))) as address:
        context = chromium.new_context(viewport=PHONE)
        page = context.new_page()
        page.goto(address)
        assert page.url.endswith("/login")
        assert width(page)[0] <= 390
        page.fill("input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("[role=alert]")
        page.fill("input", "a key of some length")
        page.keyboard.press("Enter")
        page.wait_for_selector("#classify")
        page.click("#example-1")
        page.wait_for_selector("#photograph-1 img")
        page.click("#classify")
        page.wait_for_selector(ANSWER)
        context.close()


@pytest.mark.slow
def test_the_real_service_answers_and_explains_on_its_page(chromium: Any, tiny_run: Run, sample_root: Path) -> None:
    from dualrefnet import Predictor
    from dualrefnet.service.app import create_app

    predictor = Predictor.load(tiny_run)
    # What a model asks first depends on its training; here two questions that this visit answers.
    assert predictor.decision is not None
    predictor.decision = replace(predictor.decision, field_effects={"age": 0.2, "itch": 0.1})
    photograph = next((sample_root / "images").iterdir())
    with served(create_app(predictor, ServiceSettings(accept_missingness_shortcut=True))) as address:
        context = chromium.new_context(viewport=DESK, reduced_motion="reduce")
        visit = Visit(context.new_page(), address)
        page = visit.page
        assert "DRAWN pictures, not clinical" in page.inner_text("#header")
        visit.choose(photograph)
        page.wait_for_selector("#photograph-1 img")
        page.fill("#question-age input, #question-age textarea", "61")
        page.click("#question-itch input[value=yes]")
        text = visit.classify()
        expected = predictor.predict(photograph, {"age": 61.0, "itch": True})
        assert predictor.class_names[expected.label].lower() in text.lower()
        assert f"{round(100 * expected.probabilities[expected.label])}%" in text
        page.wait_for_selector(EXPLANATION, timeout=60_000)
        assert page.locator("#explanation tbody tr").count() == 2
        assert visit.elsewhere == []
        assert visit.complaints == []
        context.close()
