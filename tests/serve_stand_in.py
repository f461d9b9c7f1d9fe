"""Serve a model that costs nothing, in a process of its own: `python serve_stand_in.py SERVED_AS_JSON [SECONDS]`."""

import sys

from dualrefnet.deploy.predictor import Predictor
from dualrefnet.service.server import Served, serve
from live_service import StandInPredictor

if __name__ == "__main__":
    delay = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    Predictor.load = classmethod(lambda cls, *arguments: StandInPredictor(delay))  # type: ignore[method-assign,assignment]
    sys.exit(serve(Served.model_validate_json(sys.argv[1])))
