# The web service and batch prediction, without anything that trains:
#   docker build -t dualrefnet .                              serves exported bundles on a CPU; holds onnxruntime and no torch
#   docker build --build-arg FLAVOUR=gpu -t dualrefnet:gpu .  serves run folders too, on a GPU; holds torch with CUDA
# docs/serving.md tells how to run it.
ARG FLAVOUR=cpu

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# What a bundle needs, in the locked versions. The package is installed without its dependencies, since most of them are for training.
FROM python:3.11-slim AS cpu
COPY requirements.lock /
RUN python -m venv /opt/dualrefnet \
    && /opt/dualrefnet/bin/pip install --no-cache-dir --constraint /requirements.lock \
        numpy opencv-python-headless pillow pandas pydantic PyYAML typer rich psutil huggingface-hub \
        onnxruntime fastapi uvicorn python-multipart prometheus-client
COPY --from=wheel /wheels /wheels
RUN /opt/dualrefnet/bin/pip install --no-cache-dir --no-deps /wheels/*.whl

FROM python:3.11-slim AS gpu
COPY requirements.lock /
COPY --from=wheel /wheels /wheels
RUN python -m venv /opt/dualrefnet \
    && /opt/dualrefnet/bin/pip install --no-cache-dir --constraint /requirements.lock "$(ls /wheels/*.whl)[deploy]"

FROM ${FLAVOUR} AS packages

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin dualrefnet
COPY --from=packages /opt/dualrefnet /opt/dualrefnet
# The file system may be read-only; what must be written goes to /tmp. Nothing is fetched or reported while it runs.
ENV PATH=/opt/dualrefnet/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=PASSIVE \
    HF_HUB_OFFLINE=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["dualrefnet"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
