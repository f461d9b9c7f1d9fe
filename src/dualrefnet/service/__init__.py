"""The web service: images and metadata over HTTP, within limits, predicted in batches."""

from importlib.util import find_spec

from dualrefnet.errors import DependencyError, install_hint

# Looked for rather than imported: the processes that decode images need none of them.
for _library in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
    if find_spec(_library) is None:
        raise DependencyError(f"the web service needs {_library}: {install_hint('deploy')}")
