"""From uploaded images and metadata to predictions: bounded admission, decoding, and the model in batches."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from dualrefnet.errors import DataError
from dualrefnet.runtime.preprocessing import Image
from dualrefnet.service.decoder import Decoders
from dualrefnet.service.observability import Metrics, traceback_of
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor

log = logging.getLogger("dualrefnet.service")
Job = TypeVar("Job")
Result = TypeVar("Result")


class Busy(Exception):
    """The limiter is full; the client should retry a little later."""


class Limiter:
    """Bounds the number of requests and the bytes of their bodies. For one event loop."""

    def __init__(self, max_requests: int, max_bytes: int, observe: Callable[[int, int], None]) -> None:
        self._max_requests, self._max_bytes, self._observe = max_requests, max_bytes, observe
        self.requests = self.bytes = 0

    def change(self, requests: int, size: int) -> None:
        """Take requests and bytes, or give them back; if they don't fit nothing is taken, and `Busy` is raised."""
        too_many = requests > 0 and self.requests + requests > self._max_requests
        if too_many or (size > 0 and self.bytes + size > self._max_bytes):
            raise Busy
        self.requests += requests
        self.bytes += size
        self._observe(self.requests, self.bytes)


class Reservation:
    """A place and the declared bytes of a request, taken before its body is read, or `Busy`; given back at the end."""

    def __init__(self, limiter: Limiter, declared: int) -> None:
        limiter.change(1, declared)
        self._limiter, self._held, self._expected = limiter, declared, declared

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *error: object) -> None:
        self._limiter.change(-1, -self._held)

    def receive(self, size: int) -> None:
        """Count bytes of the body as they arrive, as far as they weren't declared."""
        declared = min(size, self._expected)
        self._expected -= declared
        self._limiter.change(0, size - declared)
        self._held += size - declared

    def release_body(self) -> None:
        """The body has been decoded and is no longer held."""
        self._limiter.change(0, -self._held)
        self._held = 0


class Worker(Generic[Job, Result]):
    """Runs jobs in one thread, in batches.

    A lone job starts at once; what arrives while the thread is busy forms the next batch. A job larger than `max_batch`
    runs alone.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], list[Result]],
        name: str,
        *,
        max_batch: int = 1,
        size: Callable[[Job], int] = lambda job: 1,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._name, self._max_batch, self._size, self._observe = run, name, max_batch, size, observe
        self._waiting: deque[tuple[Job, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()

    def start(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self) -> None:
        """Stop after the running batch; jobs that wait are cancelled."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        while self._waiting:
            self._waiting.popleft()[1].cancel()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, job: Job) -> Result:
        """Run a job; if the caller is cancelled before it has begun, it never runs."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        self._arrived.set()
        return await future

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._next_batch():
                await self._run_batch(batch)

    def _next_batch(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        batch: list[tuple[Job, asyncio.Future[Result]]] = []
        left = self._max_batch
        while self._waiting and (not batch or self._size(self._waiting[0][0]) <= left):
            job, future = self._waiting.popleft()
            # By a caller that is cancelled.
            if not future.cancelled():
                batch.append((job, future))
                left -= self._size(job)
        return batch

    async def _run_batch(self, batch: list[tuple[Job, asyncio.Future[Result]]]) -> None:
        jobs = [job for job, _ in batch]
        self._observe(sum(map(self._size, jobs)))
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, jobs)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            if len(batch) > 1:
                # One invalid job must not fail the others: each runs again, alone.
                for entry in batch:
                    await self._run_batch([entry])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)


@dataclass(frozen=True)
class Upload:
    """The parts of a request; `label` is the class to explain, if one is given."""

    images: list[bytes]
    metadata: dict[str, Any]
    label: str | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """One lesion: its preprocessed images (None: no image), and its metadata."""

    images: list[Image | None]
    metadata: dict[str, Any]


class Inference:
    """Serves one model. With an `explainer`, a second copy of it, predictions never wait for an explanation."""

    def __init__(
        self, predictor: Predictor, settings: ServiceSettings, metrics: Metrics, explainer: Predictor | None = None
    ) -> None:
        self.predictor, self.settings, self._metrics = predictor, settings, metrics
        self.state: Literal["starting", "ready", "stopping", "broken"] = "starting"
        # Accepted requests that were cancelled when the service stopped.
        self.given_up = 0
        # Whether the last request that came to an end waited too long.
        self._late = False
        explain_bytes = max(settings.max_upload, settings.queue_bytes // 4)
        self.limiter = Limiter(settings.queue, settings.queue_bytes, metrics.held("predict"))
        self.explain_limiter = Limiter(settings.explain_queue, explain_bytes, metrics.held("explain"))
        self._decoders = Decoders(settings, predictor.image)
        # A model serves one thread at a time.
        lock = threading.Lock()
        explain_lock = threading.Lock() if explainer else lock

        def predict(cases: list[Case]) -> list[Prediction]:
            with lock:
                return predictor.predict_lesions([case.images for case in cases], [case.metadata for case in cases])

        def explain(jobs: list[tuple[Case, str]]) -> list[Explanation]:
            model = explainer or predictor
            with explain_lock:
                return [model.explain_array(case.images[0], case.metadata, label) for case, label in jobs]

        self._predictions = Worker(
            predict,
            "predict",
            max_batch=settings.max_batch,
            size=lambda case: len(case.images),
            observe=metrics.batches.labels("predict").observe,
        )
        self._explanations = Worker(explain, "explain", observe=metrics.batches.labels("explain").observe)

    def start(self) -> None:
        """Start threads and processes, and warm the model up."""
        self._predictions.start()
        self._explanations.start()
        self._warm_up_task = asyncio.get_running_loop().create_task(self._warm_up())

    async def stop(self) -> None:
        """Stop after what the model computes."""
        self.state = "stopping"
        self._warm_up_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._warm_up_task
        await self._decoders.stop()
        await self._predictions.stop()
        await self._explanations.stop()
        self._metrics.close()

    @property
    def readiness(self) -> str:
        """`ready`, or why a request would not be answered now."""
        if self.state == "ready" and (
            self.limiter.requests >= self.settings.queue or (self._late and self.limiter.requests)
        ):
            return "busy"
        return self.state

    async def _warm_up(self) -> None:
        """Predict once: the first prediction is slow, and a model that can't predict must not be reported as ready."""
        size = self.predictor.size
        image = np.zeros((size, size, 3), dtype=np.uint8) if self.predictor.reads_image else None
        try:
            await self._decoders.start()
            await self._compute(self._predictions, Case([image], {}))
        except Exception as error:
            log.critical("model failed", extra={"error": type(error).__name__, "where": traceback_of(error)})
            self.state = "broken"
        else:
            self.state = "ready"

    async def predict(self, upload: Upload, reservation: Reservation) -> Prediction:
        """Classify one lesion; raises DataError if it doesn't suit the model, ImageError, or a Refusal."""
        self._check(upload)

        async def work() -> Prediction:
            case = Case(await self._prepare(upload.images, reservation), upload.metadata)
            return await self._compute(self._predictions, case)

        return await self._within_timeout(work())

    async def explain(self, upload: Upload, reservation: Reservation) -> tuple[Prediction, Explanation]:
        """Classify one lesion of one image at most, and explain a class (the predicted one if none is given)."""
        self._check(upload)

        async def work() -> tuple[Prediction, Explanation]:
            case = Case(await self._prepare(upload.images, reservation), upload.metadata)
            prediction = await self._compute(self._predictions, case)
            return prediction, await self._compute(self._explanations, (case, upload.label or prediction.label))

        return await self._within_timeout(work())

    def _check(self, upload: Upload) -> None:
        if upload.label not in (None, *self.predictor.classes):
            raise DataError(f"the model knows no such label; it knows {', '.join(self.predictor.classes)}")
        if upload.images and not self.predictor.reads_image:
            raise DataError("this model reads the metadata alone; send no image")
        if not upload.images and self.predictor.needs_image:
            raise DataError("this model needs an image; send it as the part images")
        self.predictor.check_metadata(upload.metadata)

    async def _within_timeout(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            async with asyncio.timeout(self.settings.timeout):
                result = await work
        except TimeoutError:
            self._late = True
            self._metrics.rejected.labels("timeout").inc()
            raise Refusal(503, "timeout", "the service is too busy to respond in time; retry", retry=True) from None
        self._late = False
        return result

    async def _prepare(self, images: list[bytes], reservation: Reservation) -> list[Image | None]:
        tasks = [asyncio.ensure_future(self._decoders.prepare(image)) for image in images]
        try:
            return list(await asyncio.gather(*tasks)) or [None]
        finally:
            images.clear()
            reservation.release_body()
            # If one is invalid or the client has disconnected, those not begun needn't be decoded.
            for task in tasks:
                task.cancel()

    async def _compute(self, worker: Worker[Job, Result], job: Job) -> Result:
        try:
            return await worker.submit(job)
        except DataError as error:
            # The input has been checked, so the fault is the model's.
            raise Refusal(500, "not_finite", str(error)) from None
