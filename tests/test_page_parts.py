import io
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from browser import StandIn, mounted
from dualrefnet.data.isic_2019 import SCHEMA as ISIC
from dualrefnet.data.schema import MetadataField
from dualrefnet.errors import DataError, ImageError
from dualrefnet.page import upload as page_upload
from dualrefnet.page.heat import overlay, scale, to_jpeg, to_png

pytest.importorskip("gradio")
pytest.importorskip("fastapi")
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dualrefnet.page.answer import answer_html, explanation_html, percent, problem_html
from dualrefnet.page.examples import draw_examples
from dualrefnet.page.form import fitting, make_questions, read_form
from dualrefnet.page.login import COOKIE, Login
from dualrefnet.page.mount import Page, is_allowed
from dualrefnet.page.upload import NAME, VARIABLE, Uploads, private_folder
from dualrefnet.service.batcher import Busy

KEY = "a key of some length"


@pytest.fixture(scope="module")
def predictor() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def client(predictor: StandIn) -> Iterator[TestClient]:
    with TestClient(mounted(predictor, max_upload=2 * 2**20, max_pixels=4_000_000)) as found:
        yield found


def photograph(kind: str = "JPEG", size: tuple[int, int] = (80, 60), **options: Any) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def send(client: TestClient, content: bytes, name: str = "x.jpg") -> Any:
    return client.post("/gradio_api/upload", files={"files": (name, content, "image/jpeg")})


def step(client: TestClient, name: str) -> int:
    config = client.get("/config").json()
    return next(one["id"] for one in config["dependencies"] if one["api_name"] == name)


def run(client: TestClient, name: str, *data: Any) -> Any:
    return client.post(
        "/gradio_api/run/predict", json={"data": list(data), "fn_index": step(client, name), "session_hash": "s"}
    )


# The heat map


def test_heat_is_laid_where_it_is_and_the_rest_of_the_photograph_stays() -> None:
    picture = np.full((40, 40, 3), 200, np.uint8)
    heat = np.zeros((40, 40), np.float32)
    heat[:20, :20], heat[30:, 30:] = 0.5, -0.4
    laid = overlay(picture, heat, side=40)
    assert (laid[24:, 24:] == 200).all(), "what is negative or zero shows the photograph"
    # Inferno ends in (252, 255, 164), of which 65% are laid over 35% of the photograph.
    assert laid[10, 10].tolist() == pytest.approx([0.65 * 252 + 70, 0.65 * 255 + 70, 0.65 * 164 + 70], abs=2)
    assert overlay(picture, np.zeros((40, 40), np.float32), side=40).tolist() == picture.tolist()
    assert overlay(picture, heat, side=90).shape == (90, 90, 3)
    with pytest.raises(ValueError, match="fit"):
        overlay(picture, heat[:20])
    with pytest.raises(ValueError, match="finite"):
        overlay(picture, np.full((40, 40), np.nan, np.float32))


def test_the_scale_is_told_apart_without_seeing_colours() -> None:
    grey = cv2.cvtColor(scale(), cv2.COLOR_RGB2LAB)[0, :, 0].astype(int)
    hot = grey[len(grey) // 2 :]
    assert (np.diff(hot) >= -1).all(), "from half of the maximum on, lightness rises"
    assert hot[-1] - hot[0] > 60
    picture = scale()
    assert np.asarray(Image.open(io.BytesIO(to_png(picture)))).tolist() == picture.tolist()
    assert Image.open(io.BytesIO(to_jpeg(picture))).size == picture.shape[1::-1]


# The form


def test_questions_are_grouped_worded_and_stand_at_unknown(predictor: StandIn) -> None:
    questions = make_questions(predictor)  # type: ignore[arg-type]
    assert [question.name for question in questions[:4]] == ["age", "region", "itch", "grew"]
    first = [question.first for question in questions]
    assert first == sorted(first, reverse=True)
    by_name = {question.name: question for question in questions}
    assert by_name["itch"].choices == (("unknown", ""), ("yes", "yes"), ("no", "no"))
    assert by_name["age"].label == "Age of the patient (years)"
    assert by_name["age"].hint == "0 to 120; empty: unknown"
    father = dict(by_name["background_father"].choices)
    assert father["unknown"] == ""
    assert father["Brazil"] == "BRAZIL"
    assert "BRASIL" not in father.values()
    assert "UNK" not in father.values()
    assert all(question.text for question in questions)


def test_what_changes_the_answer_most_is_asked_first() -> None:
    effects = {
        "smoke": 0.3,
        "fitspatrick": 0.2,
        "age": 0.1,
        **dict.fromkeys(["itch", "grew", "hurt", "changed", "bleed", "drink"], 0.01),
    }
    questions = make_questions(StandIn(decision=SimpleNamespace(field_effects=effects)))  # type: ignore[arg-type]
    first = [question.name for question in questions if question.first]
    assert first[:2] == ["age", "fitspatrick"]
    assert {"smoke", "itch"} < set(first)
    assert len(first) == 8


def test_blank_metadata_are_never_said_not_to_matter(predictor: StandIn) -> None:
    nothing = SimpleNamespace(label="MEL", saliency=None, fields={})
    html = explanation_html(nothing, None, {}, predictor, make_questions(predictor), 1)  # type: ignore[arg-type]
    assert "no answer mattered" not in html
    assert "answers may change them" in html


def test_a_shortcut_stands_in_red_above_everything() -> None:
    with TestClient(mounted(StandIn(shortcut="to this model missing means benign"))) as client:
        page = client.get("/").text
    assert "To this model missing means benign" in page


def test_a_form_is_read_back_as_the_model_wants_it(predictor: StandIn) -> None:
    questions = make_questions(predictor)  # type: ignore[arg-type]
    values = {"age": "61,5", "region": "FACE", "itch": "yes", "grew": "no", "hurt": "", "smoke": None, "diameter_1": 7}
    assert read_form(questions, values) == {
        "age": 61.5,
        "region": "FACE",
        "itch": True,
        "grew": False,
        "diameter_1": 7.0,
    }
    assert read_form(questions, {}) == {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("age", "old", "must be a number"),
        ("age", "121", "must be 0 to 120 years"),
        ("age", "-1", "must be 0 to 120 years"),
        ("age", "nan", "must be a number"),
        ("age", "inf", "must be a number"),
        ("age", "1_0", "must be a number"),
        ("age", True, "must be a number"),
        ("age", [61], "must be a number"),
        ("region", "MOON", "isn't one of its choices"),
        ("region", 3, "isn't one of its choices"),
        ("itch", "True", "isn't one of its choices"),
    ],
)
def test_what_a_form_cant_hold_is_refused_without_being_repeated(
    predictor: StandIn, name: str, value: Any, message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read_form(make_questions(predictor), {name: value})  # type: ignore[arg-type]
    assert "MOON" not in str(caught.value)
    assert "old" not in str(caught.value)


@pytest.mark.parametrize("fields", [StandIn().fields, ISIC.fields, ()])
def test_examples_fit_the_fields_of_each_data_set(fields: tuple[MetadataField, ...]) -> None:
    questions = make_questions(StandIn(fields=fields))  # type: ignore[arg-type]
    examples = draw_examples()
    assert len(examples) == 3
    for example in examples:
        assert "rawn" in example.title
        held = fitting(questions, example.answers)
        assert (
            len(read_form(questions, held))
            == len(held)
            == sum(question.name in example.answers for question in questions)
        )
    again = draw_examples()
    assert all((one.picture == other.picture).all() for one, other in zip(examples, again, strict=True))


# The answer


def prediction(**changes: Any) -> Any:
    values = {
        "label": "MEL",
        "probabilities": {"ACK": 0.1, "BCC": 0.004, "MEL": 0.996, "NEV": 0.2, "SCC": 0.02, "SEK": 0.08},
        "malignancy": 0.62,
        "warnings": [],
        "out_of_scope": 0.4,
        "likely": ("MEL", "NEV"),
        "refer": True,
        "availability": "image, 33-67% of fields",
    }
    return SimpleNamespace(**{**values, **changes})


def test_an_answer_says_everything_in_words(predictor: StandIn) -> None:
    questions = make_questions(predictor)  # type: ignore[arg-type]
    text = re.sub(r"<[^>]*>", "", answer_html(prediction(), predictor, questions, 1))  # type: ignore[arg-type]
    assert "Melanoma" in text
    assert "With 90% coverage the answer is one of: melanoma or nevus." in text
    assert "62% probability of a malignant lesion" in text
    assert "Referral advised" in text
    assert "For research. Not a medical device. Not a diagnosis." in text
    assert "model learned from" not in text
    alone = answer_html(prediction(likely=("MEL",), refer=False), predictor, questions, 1)  # type: ignore[arg-type]
    assert "the answer is <strong>melanoma</strong> alone" in alone
    assert "Below the referral threshold for such an input" in alone
    assert "image, 33-67% of fields" in alone
    every = answer_html(prediction(likely=predictor.classes), predictor, questions, 1)  # type: ignore[arg-type]
    assert "any of the 6 classes" in every
    bare = answer_html(prediction(likely=(), refer=None, malignancy=None), predictor, questions, 2)  # type: ignore[arg-type]
    assert "coverage" not in bare
    assert "eferral" not in bare
    assert "malignant lesion" not in bare
    assert "2 photographs were read as one lesion" in bare


def test_probabilities_stand_in_a_table_likeliest_first(predictor: StandIn) -> None:
    html = answer_html(prediction(), predictor, (), 1)  # type: ignore[arg-type]
    rows = re.findall(r'<th scope="row">([A-Z][a-z ]+)', html)
    assert [row.strip() for row in rows] == [
        "Melanoma",
        "Nevus",
        "Actinic keratosis",
        "Seborrheic keratosis",
        "Squamous cell carcinoma",
        "Basal cell carcinoma",
    ]
    assert "<caption>" in html
    assert [percent(value) for value in (0.0, 0.004, 0.124, 0.5, 0.991, 1.0)] == [
        "less than 1%",
        "less than 1%",
        "12%",
        "50%",
        "more than 99%",
        "more than 99%",
    ]


def test_a_picture_out_of_scope_is_said_first_and_gaps_in_words(predictor: StandIn) -> None:
    warnings = ["the picture doesn't look like", "missing and imputed: itch, age", "odd <b>: x"]
    questions = make_questions(predictor)  # type: ignore[arg-type]
    html = answer_html(prediction(out_of_scope=1.2, warnings=warnings), predictor, questions, 1)  # type: ignore[arg-type]
    assert html.index('class="alarm"') < html.index("Melanoma")
    assert "2 of 21 questions unanswered, 2 of them among those that change the answer most" in html
    assert "<li>Does it itch?</li>" in html
    assert "Odd &lt;b&gt;: x" in html


def test_nothing_from_outside_becomes_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    fields = (
        MetadataField(name="age", kind="numeric", description=evil),
        MetadataField(name="b", kind="categorical", categories=(evil,)),
    )
    predictor = StandIn(fields=fields, class_names={"MEL": evil, "NEV": evil}, title=evil, name=evil)
    questions = make_questions(predictor)  # type: ignore[arg-type]
    pieces = [
        answer_html(prediction(warnings=[evil, f"missing and {evil}: age"]), predictor, questions, 1),  # type: ignore[arg-type]
        explanation_html(
            SimpleNamespace(label="MEL", saliency=np.ones((8, 8), np.float32), fields={"age": 0.2, "b": -0.1}),  # type: ignore[arg-type]
            np.zeros((8, 8, 3), np.uint8),
            {"age": 3.0, "b": evil},
            predictor,
            questions,
            1,  # type: ignore[arg-type]
        ),
        problem_html(evil),
    ]
    assert not any("<img src=x" in piece for piece in pieces)
    assert all("&lt;img src=x" in piece for piece in pieces)
    with TestClient(mounted(predictor)) as client:
        assert "<img src=x" not in client.get("/").text


def test_an_explanation_names_what_mattered_most_with_its_sign(predictor: StandIn) -> None:
    questions = make_questions(predictor)  # type: ignore[arg-type]
    heat = np.zeros((8, 8), np.float32)
    heat[2, 2] = 0.231
    told = SimpleNamespace(label="MEL", saliency=heat, fields={"itch": -0.05, "age": 0.123, "grew": 0.0001})
    seen = np.zeros((8, 8, 3), np.uint8)
    html = explanation_html(told, seen, {"itch": True, "age": 61.0, "grew": False}, predictor, questions, 1)  # type: ignore[arg-type]
    text = re.sub(r"<[^>]*>", "|", html)
    assert "covering the brightest lowers the probability of melanoma by 23.1 percentage points" in text
    assert "“61 years” to “Age of the patient”: it raised the probability of melanoma by 12.3 percentage points" in text
    assert re.findall(r"[+−]?\d+\.\d(?=\|\|)", text[text.index("Change in") :]) == ["+12.3", "−5.0", "0.0"]
    assert html.count("data:image/jpeg;base64,") == 2
    assert "http" not in html
    nothing = SimpleNamespace(label="MEL", saliency=None, fields={})
    assert "No question was answered" in explanation_html(nothing, None, {}, predictor, questions, 0)  # type: ignore[arg-type]
    cold = SimpleNamespace(label="MEL", saliency=np.full((8, 8), -0.1, np.float32), fields={"itch": 0.0})
    html = explanation_html(cold, seen, {"itch": True}, predictor, questions, 3)  # type: ignore[arg-type]
    assert "no single place" in html
    assert "No single answer changed" in html
    assert "Only the first photograph" in html


# The gate in front of uploads


def test_an_upload_leaves_nothing_but_its_pixels(client: TestClient) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "Maria Silva, born 1950", "Dr. Who"
    exif.get_ifd(0x8825)[1] = "N"
    sent = photograph(exif=exif.tobytes(), comment=b"Maria Silva", quality=95)
    answer = send(client, sent, "maria_silva_1950.jpg")
    assert answer.status_code == 200
    (name,) = answer.json()
    assert NAME.fullmatch(name)
    folder = private_folder()
    kept = (folder / name).read_bytes()
    with Image.open(io.BytesIO(kept)) as found, Image.open(io.BytesIO(sent)) as original:
        assert found.format == "PNG"
        assert dict(found.info) == {}
        assert not found.getexif()
        assert np.asarray(found).tolist() == np.asarray(original.convert("RGB")).tolist()
    shown = client.get(f"/gradio_api/file={name}")
    assert shown.headers["content-type"] == "image/jpeg"
    for content in (kept, shown.content, *(path.name.encode() for path in folder.rglob("*"))):
        assert b"aria" not in content.lower() or b"maria" not in content.lower()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"hello, I am a text", 400, "isn't a JPEG, PNG, BMP, TIFF or WebP image"),
        (photograph()[:300], 400, "damaged or truncated"),
        (photograph("PNG", (2100, 2000))[:500_000], 400, "2100 x 2000 pixels; the limit is 4,000,000"),
        (photograph(size=(8, 8)), 400, "no side may be shorter"),
        (b"\xff\xd8\xff" + b"x" * 2 * 2**20, 413, "larger than"),
        (b"", 400, "isn't a JPEG"),
    ],
)
def test_what_isnt_a_photograph_is_refused_with_a_sentence(
    client: TestClient, content: bytes, status: int, message: str
) -> None:
    answer = send(client, content)
    assert (answer.status_code, message in answer.text) == (status, True), answer.text
    assert not list(private_folder().glob("*.tmp"))


def test_requests_that_arent_of_one_file_are_refused(client: TestClient) -> None:
    two = [("files", ("a.jpg", photograph(), "image/jpeg")), ("files", ("b.jpg", photograph(), "image/jpeg"))]
    assert client.post("/gradio_api/upload", files=two).status_code == 400
    assert client.post("/gradio_api/upload", content=photograph()).status_code == 400
    assert client.post("/gradio_api/upload", data={"x": "y"}).status_code == 400
    odd = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/gradio_api/upload", content=b"--b\r\nrubbish", headers=odd).status_code == 400
    assert (
        client.post("/gradio_api/upload", content=b"x", headers={"content-type": "multipart/form-data"}).status_code
        == 400
    )


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=photograph-00000000000000000000000000000000.png",
        "/gradio_api/file=example-1.png%00",
        "/gradio_api/file=example-1.png/../../../etc/passwd",
        "/gradio_api/file=http://example.org/x.png",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=https://example.hf.space/x",
        "/assets/../../../../etc/passwd",
        "/assets/%2e%2e/%2e%2e/gradio/routes.py",
        "/static/..%2f..%2froutes.py",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/token",
        "/gradio_api/queue/data?session_hash=x",
        "/gradio_api/queue/status",
        "/gradio_api/heartbeat/x",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-code",
        "/monitoring",
        "/monitoring/summary",
        "/svelte/x",
        "/pwa_icon",
        "/manifest.json",
        "/custom_component/x",
        "/robots.txt",
        "/logout",
        "/x",
    ],
)
def test_routes_of_gradio_that_the_page_doesnt_need_arent_there(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert b"root:" not in answer.content
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    "path",
    ["component_server", "queue/join", "call/classify", "reset", "cancel", "process_recording", "vibe-edit", "upload/"],
)
def test_nothing_else_can_be_posted_to_gradio(client: TestClient, path: str) -> None:
    assert client.post(f"/gradio_api/{path}", json={}).status_code == 404


def test_examples_can_be_looked_at_and_the_page_carries_safe_headers(client: TestClient) -> None:
    assert client.get("/gradio_api/file=example-1.png").headers["content-type"] == "image/jpeg"
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    (script,) = re.findall(r'src="\./(assets/index-[^"]*\.js)"', answer.text)
    assert "immutable" in client.get(f"/{script}").headers["cache-control"]
    assert client.get("/assets/none.js").headers["cache-control"] == "no-store"
    assert client.get("/?deep_link=../x&__theme=dark").status_code == 200


# The two steps


def asked(*photographs: str, **form: Any) -> str:
    return json.dumps({"photographs": list(photographs), "form": form, "time": 1})


def test_a_photograph_and_a_form_become_an_answer_and_an_explanation(client: TestClient, predictor: StandIn) -> None:
    (name,) = send(client, photograph()).json()
    question = asked(name, age="61", itch="yes", region="FACE")
    html, label, of = run(client, "classify", question).json()["data"]
    assert of == question
    assert label in predictor.classes
    images, form = predictor.seen[-1]
    assert form == {"age": 61.0, "itch": True, "region": "FACE"}
    assert images == [(private_folder() / name).read_bytes()]
    assert "coverage" in html
    why, of = run(client, "explain", question, label).json()["data"]
    assert of == question
    assert "data:image/jpeg;base64," in why
    assert "Age of the patient" in why
    assert run(client, "explain", question, "").json()["data"] == ["", question]


def test_several_photographs_are_pooled_and_too_many_refused(client: TestClient, predictor: StandIn) -> None:
    names = [send(client, photograph(quality=quality)).json()[0] for quality in (60, 70, 80)]
    assert "3 photographs were read" in run(client, "classify", asked(*names)).json()["data"][0]
    assert len(predictor.seen[-1][0]) == 3
    assert "reload" in run(client, "classify", asked(*names, names[0])).json()["data"][0]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (asked(), "needs a photograph"),
        (asked("photograph-00000000000000000000000000000000.png"), "here any more"),
        (asked("../../etc/passwd"), "no such photograph"),
        (asked("example-1.png", age="old"), "must be a number"),
        ("not JSON", "reload"),
        ('{"photographs": [3], "form": {}}', "reload"),
        ("[" * 100_000, "reload"),
        (None, "reload"),
    ],
)
def test_what_cant_be_answered_is_said(client: TestClient, question: str | None, message: str) -> None:
    html, label, _ = run(client, "classify", question).json()["data"]
    assert message in html
    assert label == ""


def test_only_requests_of_the_page_reach_gradio(client: TestClient, capfd: pytest.CaptureFixture[str]) -> None:
    number = step(client, "classify")
    file = {"path": "/etc/passwd", "url": "http://example.org", "meta": {"_type": "gradio.FileData"}}
    for body in (
        {"data": [file], "fn_index": number},
        {"data": ["secret answer", "secret answer"], "fn_index": number},
        {"data": ["secret answer"], "fn_index": 10_000},
        {"data": ["secret answer"], "fn_index": True},
        {"data": "secret answer", "fn_index": number},
        {"fn_index": number},
        ["secret answer"],
    ):
        assert client.post("/gradio_api/run/predict", json=body).status_code == 400
    assert client.post("/gradio_api/run/predict", content=b"\xff").status_code == 400
    assert client.post("/gradio_api/run/predict", content=b'{"data": ["' + b"x" * 300_000).status_code == 413
    assert "secret" not in "".join(capfd.readouterr())


def test_a_mistake_of_the_server_is_told_without_its_words_and_logged_without_them(
    predictor: StandIn, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def fail(*_: Any) -> Any:
        raise RuntimeError("Maria Silva")

    async def busy(*_: Any) -> Any:
        raise Busy("Maria Silva")

    uploads = Uploads(tmp_path, predictor.decode, 2**20)
    uploads.write("example-1.png", np.zeros((64, 64, 3), np.uint8))

    async def ask_all() -> list[str]:
        page = Page(predictor, fail, fail, uploads)  # type: ignore[arg-type]
        other = Page(predictor, busy, busy, uploads)  # type: ignore[arg-type]
        question = asked("example-1.png")
        return [
            (await page.classify(question))[0],
            (await page.explain(question, "MEL"))[0],
            (await other.classify(question))[0],
        ]

    import anyio

    with caplog.at_level(logging.ERROR):
        told = anyio.run(ask_all)
    assert "something went wrong" in told[0].lower()
    assert "No explanation" in told[1]
    assert "too many people" in told[2].lower()
    said = "".join(told) + caplog.text + "".join(capfd.readouterr())
    assert "Maria" not in said
    assert [record.error for record in caplog.records] == ["RuntimeError", "RuntimeError"]  # type: ignore[attr-defined]


def test_a_model_that_does_without_answers_without_a_photograph() -> None:
    predictor = StandIn(needs_image=False)
    with TestClient(mounted(predictor)) as client:
        assert "Melanoma" in run(client, "classify", asked(age="61")).json()["data"][0]
        assert "Photograph of the lesion (optional)" in client.get("/").text
    blind = StandIn(reads_image=False, needs_image=False, drawn=True)
    with TestClient(mounted(blind)) as client:
        text = client.get("/").text
        assert "Photograph of the lesion" not in text
        assert "DRAWN pictures, not clinical" in text
        assert "Melanoma" in run(client, "classify", asked("example-1.png", age="61")).json()["data"][0]
        assert blind.seen[-1][0] == []


def test_two_workers_share_photographs_and_nothing_else(predictor: StandIn) -> None:
    with TestClient(mounted(predictor)) as one, TestClient(mounted(predictor)) as other:
        (name,) = send(one, photograph()).json()
        question = asked(name, age="61")
        html, label, _ = run(other, "classify", question).json()["data"]
        assert "coverage" in html
        assert "data:image" in run(one, "explain", question, label).json()["data"][0]
        assert other.get(f"/gradio_api/file={name}").status_code == 200
        app = other.app.router.routes[-1].app  # type: ignore[attr-defined]
        assert len(app.state_holder.session_data) == 0, "answers of a patient must not stay in a session"


# Time and room


def test_photographs_go_after_minutes_and_the_oldest_when_room_is_short(
    tmp_path: Path, predictor: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path, predictor.decode, 2**20, seconds=60)
    uploads.write("example-1.png", np.zeros((64, 64, 3), np.uint8))
    old, new = uploads.keep(photograph()), uploads.keep(photograph())
    for path in tmp_path.glob(f"{old[:-4]}*"):
        os.utime(path, (1, 1))
    uploads.sweep()
    with pytest.raises(ImageError, match="any more"):
        uploads.read(old)
    assert uploads.read(new)
    assert uploads.read("example-1.png")
    monkeypatch.setattr(page_upload, "_MOST_BYTES", 1)
    uploads.sweep()
    with pytest.raises(ImageError, match="any more"):
        uploads.preview(new)
    assert uploads.preview("example-1.png")


def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.raises(DataError, match="chmod 700"):
        private_folder()
    folder.chmod(0o700)
    assert private_folder() == folder
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.setenv(VARIABLE, str(link))
    with pytest.raises(DataError, match=VARIABLE):
        private_folder()


# The key


@pytest.fixture(scope="module")
def locked(predictor: StandIn) -> FastAPI:
    return mounted(predictor, api_keys=(KEY, "another key of some length"))


def test_without_a_key_every_route_of_the_page_is_shut(locked: FastAPI) -> None:
    with TestClient(locked, follow_redirects=False) as client:
        answer = client.get("/")
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        assert client.get("/login").status_code == 200
        for path in ("/config", "/gradio_api/file=example-1.png", "/theme.css", "/assets/x.js", "/x"):
            assert client.get(path).status_code == 401
        assert send(client, photograph()).status_code == 401
        assert client.post("/gradio_api/run/predict", json={"data": ["x"], "fn_index": 0}).status_code == 401


def test_the_key_opens_the_page_and_the_cookie_any_worker(locked: FastAPI, predictor: StandIn) -> None:
    with TestClient(locked, follow_redirects=False) as client:
        wrong = client.post("/login", data={"key": "a key of some lengtH"})
        assert wrong.status_code == 401
        assert "set-cookie" not in wrong.headers
        assert "the key. Try again." in wrong.text
        assert client.post("/login", content=b"key=" + b"x" * 10_000).status_code == 401
        right = client.post("/login", data={"key": KEY})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert KEY not in cookie
        assert client.get("/").status_code == 200
        assert client.get("/login").status_code == 303
        value = client.cookies[COOKIE]
    with TestClient(mounted(predictor, api_keys=(KEY,)), cookies={COOKIE: value}) as worker:
        assert worker.get("/").status_code == 200
    with TestClient(
        mounted(predictor, api_keys=("changed",)), cookies={COOKIE: value}, follow_redirects=False
    ) as changed:
        assert changed.get("/").status_code == 303


@pytest.mark.parametrize(
    "value", ["", "x", ".", "9999999999.", "9999999999.00", "99999999999999999999.00", "²9.00", "-1.00"]
)
def test_forged_and_old_cookies_open_nothing(locked: FastAPI, value: str) -> None:
    with TestClient(locked, follow_redirects=False) as client:
        answer = client.get("/", headers={"cookie": f"{COOKIE}={value}".encode()})
        assert answer.status_code == 303


def test_a_cookie_is_good_for_its_time_only_and_the_service_can_ask(locked: FastAPI) -> None:
    from starlette.requests import Request

    def request(app: FastAPI, cookie: str) -> Request:
        return Request({"type": "http", "app": app, "headers": [(b"cookie", f"{COOKIE}={cookie}".encode())]})

    over = Login([KEY], seconds=-5)
    app = FastAPI()
    assert not is_allowed(request(app, "x")), "without a page nobody is"
    app.state.page_login = over

    async def log_in(login: Login) -> str:
        sent = False

        async def receive() -> Any:
            nonlocal sent
            sent = True
            return {"type": "http.request", "body": b"key=a+key+of+some+length", "more_body": False}

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/login",
            "headers": [],
            "scheme": "https",
            "server": ("x", 443),
        }
        answer = await login.answer(Request(scope, receive), "/")
        assert "secure" in answer.headers["set-cookie"].lower()
        return answer.headers["set-cookie"].split(";")[0].split("=", 1)[1]

    import anyio

    assert not is_allowed(request(app, anyio.run(log_in, over)))
    app.state.page_login = Login([KEY])
    assert is_allowed(request(app, anyio.run(log_in, Login([KEY]))))
    app.state.page_login = Login([])
    assert is_allowed(request(app, "x"))
