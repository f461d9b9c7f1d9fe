"""From uploaded images and metadata to predictions and explanations: decoding in a pool, the model in workers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualrefnet.errors import DataError
from dualrefnet.service.batching import Limiter, Reservation, Worker
from dualrefnet.service.observability import Metrics, traceback_of
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor

log = logging.getLogger("dualrefnet.service")
Result = TypeVar("Result")
Image = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Case:
    """One lesion: its preprocessed images (None: no image), its metadata, and the class to explain."""

    images: Sequence[Image | None]
    metadata: Mapping[str, Any]
    label: str = ""


class Inference:
    """Serves one model.

    Args:
        predictor: the model.
        settings: its limits.
        metrics: of the service.
        explainer: a second copy of the model for explanations, so that predictions never wait for one. Without it both
            share the model, one at a time.

    Attributes:
        state: `ready`, or why not.
        given_up: accepted requests that were cancelled when the service stopped. limiter, explain_limiter: admission of
            predictions and of explanations.
    """

    def __init__(
        self, predictor: Predictor, settings: ServiceSettings, metrics: Metrics, explainer: Predictor | None = None
    ) -> None:
        self.predictor, self.settings, self._metrics = predictor, settings, metrics
        self.state: Literal["starting", "ready", "stopping", "broken"] = "starting"
        self.given_up = 0
        self._decoding = 0
        explain_bytes = max(settings.max_upload, settings.queue_bytes // 4)
        self.limiter = Limiter(settings.queue, settings.queue_bytes, metrics.held("predict"))
        self.explain_limiter = Limiter(settings.explain_queue, explain_bytes, metrics.held("explain"))
        # A model serves one thread at a time.
        lock = threading.Lock()
        explain_lock = threading.Lock() if explainer else lock

        def predict(cases: list[Case]) -> list[Prediction]:
            with lock:
                return predictor.predict_lesions([case.images for case in cases], [case.metadata for case in cases])

        def explain(cases: list[Case]) -> list[Explanation]:
            model = explainer or predictor
            with explain_lock:
                return [model.explain_array(case.images[0], case.metadata, case.label) for case in cases]

        self._predictions = Worker(
            predict,
            "predict",
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            size=lambda case: len(case.images),
            expected=lambda: self._decoding,
            observe=metrics.batch("predict"),
        )
        self._explanations = Worker(explain, "explain", observe=metrics.batch("explain"))

    def start(self) -> None:
        """Start the threads, and warm the model up."""
        self._decoders = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="decode")
        self._predictions.start()
        self._explanations.start()
        self._warm_up_task = asyncio.get_running_loop().create_task(self._warm_up())

    async def stop(self) -> None:
        """Stop after what is running."""
        self.state = "stopping"
        self._warm_up_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._warm_up_task
        await self._predictions.stop()
        await self._explanations.stop()
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)
        self._metrics.close()

    async def _warm_up(self) -> None:
        """Predict once: the first prediction is slow, and a model that can't predict must not be reported as ready."""
        size = self.predictor.size
        image = np.zeros((size, size, 3), dtype=np.uint8) if self.predictor.reads_image else None
        try:
            await self._predictions.submit(Case([image], {}))
        except Exception as error:
            log.critical("model failed", extra={"error": type(error).__name__, "where": traceback_of(error)})
            self.state = "broken"
        else:
            self.state = "ready"

    async def predict(
        self, images: Sequence[bytes], metadata: Mapping[str, Any], reservation: Reservation
    ) -> Prediction:
        """Classify one lesion.

        Args:
            images: encoded images.
            metadata: field -> value.
            reservation: holds the bytes of the images; they are released once decoded.

        Raises:
            Busy: the queue is full.
            DataError: the metadata or the number of images don't suit the model.
            ImageError: an image can't be decoded.
            Refusal: it took too long.
        """
        self._check(images, metadata, reservation)
        return await self._within_timeout(self._predict(images, metadata, reservation))

    async def explain(
        self, images: Sequence[bytes], metadata: Mapping[str, Any], label: str | None, reservation: Reservation
    ) -> tuple[Prediction, Explanation]:
        """Classify one lesion of one image at most, and explain a class (None: the predicted one); see `predict`."""
        if label is not None and label not in self.predictor.classes:
            raise DataError(f"the model knows no such label; it knows {', '.join(self.predictor.classes)}")
        self._check(images, metadata, reservation)

        async def both() -> tuple[Prediction, Explanation]:
            prepared = await self._prepare_all(images, reservation)
            prediction = await self._predictions.submit(Case(prepared, metadata))
            case = Case(prepared, metadata, label or prediction.label)
            return prediction, await self._explanations.submit(case)

        return await self._within_timeout(both())

    def _check(self, images: Sequence[bytes], metadata: Mapping[str, Any], reservation: Reservation) -> None:
        reservation.enter()
        if images and not self.predictor.reads_image:
            raise DataError("this model reads the metadata alone; send no image")
        if not images and self.predictor.needs_image:
            raise DataError("this model needs an image; send it as the part images")
        self.predictor.check_metadata(metadata)

    async def _within_timeout(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await work
        except TimeoutError:
            self._metrics.rejected("timeout")
            raise Refusal(503, "timeout", "the service is too busy to respond in time; retry", retry=True) from None

    async def _predict(
        self, images: Sequence[bytes], metadata: Mapping[str, Any], reservation: Reservation
    ) -> Prediction:
        return await self._predictions.submit(Case(await self._prepare_all(images, reservation), metadata))

    async def _prepare_all(self, images: Sequence[bytes], reservation: Reservation) -> list[Image | None]:
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._decoders, self._prepare, image) for image in images]
        self._decoding += 1
        try:
            return list(await asyncio.gather(*futures)) or [None]
        finally:
            self._decoding -= 1
            reservation.release_body()
            # If one is invalid or the client has disconnected, those not begun needn't be decoded.
            for future in futures:
                future.cancel()

    def _prepare(self, image: bytes) -> Image | None:
        pixels = self.predictor.decode(image, max_bytes=self.settings.max_upload, max_pixels=self.settings.max_pixels)
        return self.predictor.prepare(pixels)
