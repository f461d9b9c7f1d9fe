"""The web service on Ray Serve: the same application in replicas that scale with the load.

`serve run dualrefnet.service.ray_serve:application model=BUNDLE`, or `build_service` from Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dualrefnet.errors import DependencyError, install_hint
from dualrefnet.service.settings import ServiceSettings, read_keys

try:
    from ray import serve
except ImportError:
    raise DependencyError(f"Ray Serve needs Ray: {install_hint('scale,deploy')}") from None

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application


class RayService(BaseModel):
    """What is served on Ray, and by how many replicas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path  # folder of a run or an exported bundle, which all machines see under this name
    variant: str = "float32"  # of a bundle
    device: str = "cpu"  # or `cuda` for a GPU a replica
    settings: ServiceSettings = ServiceSettings(page=False)
    # Keys, one a line; every replica reads it, so that no key goes through Ray.
    api_key_file: Path | None = None
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, gt=0)  # of a replica
    ongoing: float = Field(default=8.0, gt=0)  # requests of a replica beyond which another one is started
    most_ongoing: int = Field(default=64, ge=1)  # requests that a replica is given at once

    @model_validator(mode="after")
    def _check(self) -> RayService:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) must be at least min_replicas ({self.min_replicas})")
        if self.settings.api_keys:
            raise ValueError("keys must not travel through Ray: leave api_keys out, and name a file in api_key_file")
        return self


def build_service(options: RayService) -> Application:
    # Called in each replica: neither the model nor a key travels.
    def make_app() -> FastAPI:
        from dualrefnet.deploy.predictor import Predictor
        from dualrefnet.service.app import create_app

        settings = options.settings.model_copy(update={"api_keys": read_keys(options.api_key_file)})
        return create_app(Predictor.load(options.model, options.device, options.variant), settings)

    deploy = serve.deployment(
        name="dualrefnet",
        max_ongoing_requests=options.most_ongoing,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": 1 if options.device.startswith("cuda") else 0},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.ongoing,
        },
        graceful_shutdown_timeout_s=options.settings.grace,
    )
    return deploy(serve.ingress(make_app)()).bind()


def application(options: dict[str, Any]) -> Application:
    """As `build_service`, of the fields of `RayService`: for `serve run` and for Ray's YAML files."""
    return build_service(RayService.model_validate(options))
