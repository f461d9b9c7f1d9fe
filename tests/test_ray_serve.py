import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from dualrefnet.deploy.predictor import Predictor
from dualrefnet.run import Run
from dualrefnet.service.app import create_app
from dualrefnet.service.server import bind
from dualrefnet.service.settings import ServiceSettings
from live_service import wait_for

pytest.importorskip("ray.serve", reason="Ray Serve isn't installed (extra `scale`)")

KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def address(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where Ray serves the tiny run."""
    import ray
    from ray import serve

    from dualrefnet.service.ray_serve import application

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        settings = {"page": False, "max_images": 2}
        serve.run(
            application({"model": str(tiny_run.path), "api_key_file": str(keys), "cpus": 0.5, "settings": settings})
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_ray_serve_answers_as_the_service_does(address: str, tiny_run: Run, sample_root: Path) -> None:
    image = next((sample_root / "images").iterdir()).read_bytes()
    data = {"metadata": json.dumps({"age": 61, "region": "FACE"})}
    settings = ServiceSettings(page=False, max_images=2, api_keys=(KEY,))
    headers = {"X-API-Key": KEY}
    with (
        TestClient(create_app(Predictor.load(tiny_run), settings)) as here,
        httpx.Client(base_url=address, timeout=30) as there,
    ):
        for client in (here, there):
            assert client.get("/healthz").json() == {"status": "alive"}
            # The model predicts once before it says that it is ready.
            wait_for(lambda client=client: client.get("/readyz").status_code == 200, 30)
            assert client.post("/v1/predict", files=[("images", image)]).status_code == 401
        responses = [
            client.post("/v1/predict", files=[("images", ("a.png", image))] * 2, data=data, headers=headers)
            for client in (here, there)
        ]
        assert [response.status_code for response in responses] == [200, 200]
        one, other = (response.json() for response in responses)
        # Ray's proxy gives the id, and says it in a second header.
        assert set(responses[1].headers["X-Request-ID"].split(", ")) == {other.pop("request_id")}
        one.pop("request_id")
        for name in ("probabilities", "malignancy", "out_of_scope"):
            assert other.pop(name) == pytest.approx(one.pop(name), abs=1e-4)
        assert other == one
        too_many = there.post("/v1/predict", files=[("images", image)] * 3, headers=headers)
        assert (too_many.status_code, too_many.json()["error"]["code"]) == (400, "too_many_parts")
        assert here.get("/v1/model", headers=headers).json() == there.get("/v1/model", headers=headers).json()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_replicas": 3, "max_replicas": 2}, "must be at least min_replicas"),
        ({"settings": {"page": False, "api_keys": [KEY]}}, "name a file in api_key_file"),
        ({"replicas": 3}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(options: dict, words: str, tmp_path: Path) -> None:
    from dualrefnet.service.ray_serve import application

    with pytest.raises(ValidationError, match=words) as caught:
        application({"model": str(tmp_path), **options})
    assert KEY not in str(caught.value)


def test_replicas_follow_the_load_between_the_limits(tmp_path: Path) -> None:
    from dualrefnet.service.ray_serve import RayService, build_service

    options = RayService(model=tmp_path, device="cuda", min_replicas=2, max_replicas=5, cpus=3, ongoing=4)
    deployment = build_service(options)._bound_deployment
    config = deployment._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (2, 5)
    assert config.autoscaling_config.target_ongoing_requests == 4
    assert config.max_ongoing_requests == 64
    assert deployment.ray_actor_options == {"num_cpus": 3, "num_gpus": 1}
