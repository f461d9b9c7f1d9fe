import base64
import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as examples
from PIL import Image
from pydantic import SecretStr, ValidationError
from starlette.testclient import TestClient

from dualrefnet.errors import DataError
from dualrefnet.run import Run
from dualrefnet.service.app import create_app
from dualrefnet.service.observability import JsonFormatter
from dualrefnet.service.schemas import ExplainedBody, ModelBody, PredictionBody
from dualrefnet.service.settings import ServiceSettings, read_keys
from live_service import (
    BEGUN,
    QUICK,
    StandInPredictor,
    connect,
    converse,
    live,
    metric,
    multipart,
    picture,
    post_head,
    question,
    status_of,
    wait_for,
)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live() as found:
        yield found


def error(response: httpx.Response) -> tuple[int, str]:
    found = response.json()["error"]
    assert found["request_id"] == response.headers["x-request-id"]
    assert found["message"]
    return response.status_code, found["code"]


def test_a_prediction_has_all_that_the_schema_says_and_no_more(client: httpx.Client) -> None:
    response = client.post("/v1/predict", **question(204, age=61))
    assert response.status_code == 200
    body = response.json()
    assert set(body) == set(PredictionBody.model_fields)
    assert PredictionBody.model_validate(body).probabilities == {"BCC": pytest.approx(0.8), "NEV": pytest.approx(0.2)}
    assert (body["label"], body["likely"], body["refer"], body["images"]) == ("BCC", ["BCC"], True, 1)
    assert body["warnings"] == ["age 61"]
    assert body["notice"].startswith("Not a medical device")
    assert body["request_id"] == response.headers["x-request-id"]


def test_an_explanation_has_attributions_and_saliency(client: httpx.Client) -> None:
    asked = question(204, age=61, itch=True, region=None)
    body = client.post("/v1/explain", files=asked["files"], data={**asked["data"], "label": "NEV"}).json()
    assert set(body) == set(ExplainedBody.model_fields)
    assert (body["label"], body["explanation"]["label"]) == ("BCC", "NEV")
    assert body["explanation"]["fields"] == [{"name": "age", "change": 0.125}, {"name": "itch", "change": 0.125}]
    heat = body["explanation"]["heat"]
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(heat["png"]))))
    assert (grey.dtype, grey.shape) == (np.uint8, (32, 32))
    expected = np.clip(np.linspace(-0.1, 0.4, 1024).reshape(32, 32), 0, None)
    assert grey / 255 * heat["maximum"] == pytest.approx(expected, abs=0.4 / 255)
    assert client.post("/v1/explain", **question(204)).json()["explanation"]["label"] == "BCC"
    assert error(client.post("/v1/explain", files=asked["files"], data={"label": "LION"})) == (422, "bad_form")


@pytest.mark.parametrize("reads_image", [True, False])
def test_models_without_images(reads_image: bool) -> None:
    with live(StandInPredictor(reads_image=reads_image, needs_image=False)) as client:
        body = client.post("/v1/explain", files={"metadata": (None, '{"age": 5}')}).json()
        assert (body["images"], body["warnings"], body["explanation"]["heat"]) == (0, ["age 5"], None)
        assert client.post("/v1/predict", **question()).status_code == (200 if reads_image else 422)
        assert client.get("/v1/model").json()["needs_image"] is False


def test_the_model_tells_its_fields_and_the_limits(client: httpx.Client) -> None:
    body = client.get("/v1/model").json()
    assert set(body) == set(ModelBody.model_fields)
    assert [field["name"] for field in body["fields"]] == ["age", "region", "itch"]
    assert body["fields"][1]["levels"] == ["FACE", "ARM"]
    assert body["limits"] == {"bytes": QUICK.max_upload, "pixels": 50_000_000, "images": 8, "metadata_bytes": 16384}


IMAGE = ("images", picture())
EMPTY = (b"", {"Content-Type": "multipart/form-data; boundary=x"})
REFUSED: dict[str, tuple[tuple[bytes, dict], tuple[int, str]]] = {
    "JSON": ((b"{}", {"Content-Type": "application/json"}), (415, "not_multipart")),
    "no type": ((b"{}", {}), (415, "not_multipart")),
    "compressed": ((b"", {**EMPTY[1], "Content-Encoding": "gzip"}), (415, "encoded")),
    "no boundary": ((b"", {"Content-Type": "multipart/form-data"}), (400, "bad_boundary")),
    "no body": (EMPTY, (400, "truncated")),
    "no parts": ((b"--x--\r\n", EMPTY[1]), (422, "bad_form")),
    "other boundary": ((multipart([IMAGE])[0], EMPTY[1]), (400, "bad_multipart")),
    "no image": (multipart([("metadata", b"{}")]), (422, "bad_form")),
    "empty image": (multipart([("images", b"")]), (422, "bad_photograph")),
    "GIF": (multipart([("images", b"GIF89a is no image")]), (422, "bad_photograph")),
    "TIFF": (multipart([("images", picture(kind="TIFF"))]), (422, "bad_photograph")),
    "BMP": (multipart([("images", picture(kind="BMP"))]), (422, "bad_photograph")),
    "too small": (multipart([("images", picture(side=8))]), (422, "bad_photograph")),
    "half": (multipart([("images", picture()[:60])]), (422, "bad_photograph")),
    "nine": (multipart([IMAGE] * 9), (400, "too_many_parts")),
    "metadata twice": (multipart([IMAGE, ("metadata", b"{}"), ("metadata", b"{}")]), (400, "too_many_parts")),
    "other part": (multipart([IMAGE, ("image", picture())]), (400, "unknown_part")),
    "label": (multipart([IMAGE, ("label", b"BCC")]), (400, "unknown_part")),
    "unknown field": (multipart([IMAGE, ("metadata", b'{"shoe_size": 43}')]), (422, "bad_form")),
    "text for a number": (multipart([IMAGE, ("metadata", b'{"age": "old"}')]), (422, "bad_form")),
    "a list": (multipart([IMAGE, ("metadata", b"[]")]), (422, "not_flat")),
    "long metadata": (multipart([IMAGE, ("metadata", b'{"age": 1}' + b" " * 16384)]), (413, "part_too_large")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_form(client: httpx.Client, name: str) -> None:
    (content, headers), expected = REFUSED[name]
    assert error(client.post("/v1/predict", content=content, headers=headers)) == expected


def test_what_answers_get_answers_head_without_a_body(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v1/model", "/metrics", "/docs", "/openapi.json", "/nothing"):
        response = client.head(path)
        assert response.status_code == client.get(path).status_code
        assert not response.content


def test_every_response_has_an_id_and_security_headers(client: httpx.Client) -> None:
    responses = [client.get(path) for path in ("/healthz", "/docs", "/nothing", "/openapi.json")]
    responses += [client.post("/v1/predict", content=b"x"), client.put("/metrics")]
    for headers in [response.headers for response in responses]:
        assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers


KEYED = QUICK.model_copy(update={"api_keys": (SecretStr("first-key-of-many"), SecretStr("second-key-of-many"))})


def test_keys_cover_everything_but_the_two_probes() -> None:
    with live(settings=KEYED) as client:
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        for path in ("/v1/model", "/metrics", "/openapi.json", "/nothing", "/healthz%0A", "/healthz/../v1/model"):
            response = client.get(path)
            assert error(response) == (401, "no_key"), path
            assert response.headers["www-authenticate"].startswith("Bearer")
        for key in ("first-key-of-many", "second-key-of-many"):
            assert client.get("/v1/model", headers={"X-API-Key": key}).status_code == 200
            assert client.get("/metrics", headers={"Authorization": f"bearer {key}"}).status_code == 200
        for wrong in ("", "first-key-of-man", "first-key-of-many,", "FIRST-KEY-OF-MANY", "\xff" * 40):
            headers = {"X-API-Key": wrong.encode("latin-1")}
            assert client.post("/v1/predict", **question(), headers=headers).status_code == 401
        assert client.post("/v1/predict", **question(), headers={"X-API-Key": "second-key-of-many"}).status_code == 200
        paths = client.get("/openapi.json", headers={"X-API-Key": "first-key-of-many"}).json()["paths"]
        assert "401" in paths["/v1/predict"]["post"]["responses"]
        assert "401" not in paths["/healthz"]["get"]["responses"]


def test_keys_are_read_from_the_environment_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    keys = [f"key-number-{number}-of-three" for number in (1, 2, 3)]
    file.write_text(f"# whose\n{keys[0]}  # the clinic\n\n{keys[1]}\n{keys[0]}\n")
    file.chmod(0o600)
    found = read_keys(file, {"DUALREFNET_API_KEY": f" {keys[2]} "})
    assert [key.get_secret_value() for key in found] == [keys[2], keys[0], keys[1]]
    assert not capsys.readouterr().err
    assert read_keys(None, {}) == ()
    file.chmod(0o644)
    read_keys(file, {"DUALREFNET_API_KEY": "short"})
    warnings = capsys.readouterr().err
    assert "chmod 600" in warnings
    assert "only 5 characters" in warnings
    settings = ServiceSettings(api_keys=found)
    assert "key-number" not in repr(settings) + settings.model_dump_json()
    file.write_text("# nobody\n")
    for broken, variable in ((file, {}), (tmp_path / "nowhere", {}), (None, ""), (None, "two words and more")):
        with pytest.raises(DataError):
            read_keys(broken, variable if isinstance(variable, dict) else {"DUALREFNET_API_KEY": variable})


@pytest.mark.parametrize(
    "values",
    [
        {"max_upload": 2**30},
        *({"root_path": path} for path in ("x", "/", "/a b", "//evil\n")),
        *({"allow_origins": [origin]} for origin in ("*", "lesions.example.org", "https://lesions.example.org/page")),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        ServiceSettings(**values)


def post(client: httpx.Client, path: str, found: list[int]) -> threading.Thread:
    def ask() -> None:
        found.append(httpx.post(f"{client.base_url}{path}", **question(), timeout=20).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_full_queue_refuses_at_once_and_explanations_have_places_of_their_own() -> None:
    settings = QUICK.model_copy(update={"queue": 2, "explain_queue": 1})
    with live(StandInPredictor(delay=0.6), settings) as client:
        found: list[int] = []
        threads = [post(client, "/v1/predict", found) for _ in range(2)]
        wait_for(lambda: metric(client.base_url, "dualrefnet_queue_requests", lane="predict") == 2)
        response = client.post("/v1/predict", **question())
        assert error(response) == (429, "full")
        assert int(response.headers["retry-after"]) >= 1
        assert error(client.get("/readyz")) == (503, "busy")
        # Not even its body is asked for.
        assert status_of(converse(client, post_head(length=1_000_000))) == 429
        threads.append(post(client, "/v1/explain", found))
        wait_for(lambda: metric(client.base_url, "dualrefnet_queue_requests", lane="explain") == 1)
        assert error(client.post("/v1/explain", **question())) == (429, "full")
        for thread in threads:
            thread.join()
        assert found == [200, 200, 200]
        assert metric(client.base_url, "dualrefnet_rejected_total", reason="full") == 3
        assert client.post("/v1/predict", **question()).status_code == client.get("/readyz").status_code == 200
        for name in ("dualrefnet_queue_requests", "dualrefnet_queue_bytes"):
            assert metric(client.base_url, name) == 0


@pytest.mark.parametrize("limits", [{"queue_bytes": 100_000}, {"queue": 1}])
def test_bodies_count_before_they_are_read(limits: dict) -> None:
    settings = QUICK.model_copy(update={"max_upload": 60_000, **limits})
    with live(settings=settings) as client:
        with connect(client) as first:
            first.sendall(post_head(length=60_000))
            wait_for(lambda: metric(client.base_url, "dualrefnet_queue_bytes") == 60_000)
            assert status_of(converse(client, post_head(length=60_000))) == 429
        wait_for(lambda: metric(client.base_url, "dualrefnet_queue_bytes") == 0)
        if "queue_bytes" in limits:
            with connect(client) as chunked:
                chunked.sendall(post_head("Transfer-Encoding: chunked") + b"c800\r\n" + BEGUN + b"x" * 51_000)
                wait_for(lambda: metric(client.base_url, "dualrefnet_queue_bytes") > 50_000)
                assert status_of(converse(client, post_head(length=60_000))) == 429


def test_a_client_that_disconnects_frees_its_place() -> None:
    body, _ = multipart([IMAGE])
    with live(StandInPredictor(delay=0.4), QUICK.model_copy(update={"queue": 2, "max_batch": 1})) as client:
        for _ in range(2):
            connections = [connect(client) for _ in range(2)]
            for connection in connections:
                connection.sendall(post_head(length=len(body)) + body)
            wait_for(lambda: metric(client.base_url, "dualrefnet_queue_requests") == 2)
            for connection in connections:
                connection.close()
            wait_for(lambda: metric(client.base_url, "dualrefnet_queue_requests") == 0, seconds=0.35)
        assert metric(client.base_url, "dualrefnet_rejected_total", reason="client gone") == 4
        assert client.post("/v1/predict", **question()).status_code == 200


def test_a_request_that_waits_too_long_is_told_to_ask_again() -> None:
    with live(StandInPredictor(delay=0.5), QUICK.model_copy(update={"timeout": 0.2})) as client:
        response = client.post("/v1/predict", **question())
        assert error(response) == (503, "timeout")
        assert response.headers["retry-after"] == "1"
        assert metric(client.base_url, "dualrefnet_rejected_total", reason="timeout") == 1


def test_too_many_connections_are_refused() -> None:
    with live(settings=QUICK.model_copy(update={"connections": 3})) as client:
        idle = [connect(client) for _ in range(2)]
        asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert status_of(converse(client, asked)) == 503
        for connection in idle:
            connection.close()
        wait_for(lambda: status_of(converse(client, asked)) == 200)


def test_nothing_of_the_client_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secret = "SECRETSECRET"

    class Broken(StandInPredictor):
        def check_metadata(self, form: Any) -> None:
            if "itch" in form:
                raise RuntimeError(f"can't read {form}") from KeyError(form["itch"])
            super().check_metadata(form)

    with live(Broken()) as client:
        image = ("images", (f"{secret}.png", picture(), f"image/{secret}"))
        for form in ({"age": secret}, {secret: 1}, {"itch": secret}, {"region": secret}):
            response = client.post(f"/v1/predict?patient={secret}", files=[image], data={"metadata": json.dumps(form)})
            assert response.status_code != 500 or (error(response)[1] == "internal" and secret not in response.text)
        client.get(f"/{secret}?{secret}", headers={"X-Request-ID": f"{secret}_", "X-API-Key": secret, "Cookie": secret})
        client.post("/v1/predict", content=secret, headers={"Content-Type": f"multipart/form-data; boundary={secret}"})
        converse(client, f"{secret} {secret}\r\n\r\n".encode())
    records = [record for record in caplog.records if record.name in ("dualrefnet.service", "uvicorn.error")]
    lines = [JsonFormatter().format(record) for record in records]
    assert not [line for line in lines if secret in line]
    events = [json.loads(line) for line in lines]
    asked = [event for event in events if event["event"] == "request" and event["route"] == "/v1/predict"]
    assert [event["status"] for event in asked] == [422, 422, 500, 200, 400]
    assert set(asked[0]) == {"time", "level", "event", "id", "route", "status", "ms", "bytes_in", "bytes_out"}
    broken = next(event for event in events if event["event"] == "error")
    assert broken["error"] == "RuntimeError"
    assert broken["where"][-1].endswith("check_metadata")
    assert broken["id"] == asked[2]["id"]


CHECKS = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
}
schema = schemathesis.openapi.from_dict(create_app(StandInPredictor(), QUICK).openapi())
GENERATE = {"derandomize": True, "phases": [Phase.explicit, Phase.generate], "suppress_health_check": list(HealthCheck)}


@schema.parametrize()
@examples(max_examples=25, **GENERATE)
def test_programs_that_follow_the_description_meet_nothing_else(case: Any, client: httpx.Client) -> None:
    wanted = [check for check in schemathesis.checks.CHECKS.get_all() if check.__name__ in CHECKS]
    assert len(wanted) == len(CHECKS)
    case.call_and_validate(base_url=str(client.base_url).rstrip("/"), checks=wanted)


def test_a_trained_run_answers_as_its_predictor_does(tiny_run: Run, sample_root: Path) -> None:
    from dualrefnet.deploy.predictor import Predictor

    predictor = Predictor.load(tiny_run)
    images = [path.read_bytes() for path in sorted((sample_root / "images").iterdir())[:2]]
    form = {"age": 61, "region": "FACE", "itch": True}
    data = {"metadata": json.dumps(form)}
    with live(predictor) as client:
        files = [("images", ("x", image)) for image in images]
        body = client.post("/v1/predict", files=files, data=data).json()
        expected = predictor.predict_lesion(images, form)
        assert body["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert (body["label"], body["likely"], body["warnings"]) == (
            expected.label,
            list(expected.likely),
            expected.warnings,
        )
        found = client.post("/v1/explain", files=files[:1], data=data).json()["explanation"]
        explanation = predictor.explain(images[0], form)
        assert found["label"] == explanation.label
        changes = {field["name"]: field["change"] for field in found["fields"]}
        assert changes == pytest.approx(explanation.fields, abs=1e-6)
        unknown = client.post("/v1/predict", files=files, data={"metadata": '{"shoe_size": 43}'})
        assert error(unknown) == (422, "bad_form")
        assert ModelBody.model_validate(client.get("/v1/model").json()).classes == list(predictor.classes)


def test_readiness_waits_for_the_first_prediction() -> None:
    app = create_app(StandInPredictor(delay=0.5), QUICK)
    with TestClient(app, base_url="http://localhost") as client:
        assert error(client.get("/readyz")) == (503, "starting")
        assert client.get("/healthz").status_code == 200
        wait_for(lambda: client.get("/readyz").status_code == 200)
        app.state.inference.state = "stopping"
        assert error(client.get("/readyz")) == (503, "stopping")
        assert client.post("/v1/predict", **question()).status_code == 200
