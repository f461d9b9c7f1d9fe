"""From the bytes of photographs and a form to an answer: decoding in a pool, prediction in one lane, explanation in
another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dualrefnet.errors import DataError
from dualrefnet.service.batcher import Batcher, Busy, Lane, Photographs, Place, Room
from dualrefnet.service.observability import Observed, where
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Explanation, Prediction, Predictor

log = logging.getLogger("dualrefnet.service")
Result = TypeVar("Result")
RETRY = {"Retry-After": "1"}


@dataclass
class Standing:
    """Whether the service can answer; shared by the routes and the server's connections.

    Attributes:
        state: ready, or why not.
        given_up: requests that were accepted and that the service stopped without answering.
    """

    state: Literal["starting", "ready", "stopping", "broken"] = "starting"
    given_up: int = 0

    def stop(self) -> None:
        """Say that the service stops."""
        self.state = "stopping"


@dataclass(frozen=True, eq=False)
class _Question:
    photograph: NDArray[np.uint8] | None
    form: Mapping[str, Any]
    label: str


class Answering:
    """Answers requests with one model.

    Attributes:
        standing: whether it can answer.
        room: places for predictions.
        explain_room: places for explanations.
    """

    def __init__(
        self, predictor: Predictor, settings: ServiceSettings, observed: Observed, explainer: Predictor | None = None
    ) -> None:
        """Make it; it answers from `start` on.

        Args:
            predictor: the model.
            settings: its limits.
            observed: what counts.
            explainer: a second copy of the model, for explanations: a prediction then never waits for one. Without it
                both share the
                model, one at a time.
        """
        self.predictor, self.settings, self._observed = predictor, settings, observed
        self._explainer = explainer or predictor
        self.standing = Standing()
        self.room = Room(
            settings.queue, settings.queue_bytes, lambda number, size: observed.held("predict", number, size)
        )
        explain_size = max(settings.max_upload, settings.queue_bytes // 4)
        self.explain_room = Room(
            settings.explain_queue, explain_size, lambda number, size: observed.held("explain", number, size)
        )
        self._decoding = 0
        # A model answers one thread at a time.
        lock = threading.Lock()
        explain_lock = lock if self._explainer is predictor else threading.Lock()

        def predict(photographs: list[Photographs], forms: list[Mapping[str, Any]]) -> list[Prediction]:
            with lock:
                return predictor.predict_lesions(photographs, [dict(form) for form in forms])

        def explain(questions: list[_Question]) -> list[Explanation]:
            with explain_lock:
                return [self._explainer.explain_array(asked.photograph, asked.form, asked.label) for asked in questions]

        self._predictions = Batcher(
            predict,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait,
            max_queue=settings.queue + settings.explain_queue + 1,
            soon=lambda: self._decoding,
            observe=lambda photographs: observed.batch("predict", photographs),
        )
        self._explanations: Lane[_Question, Explanation] = Lane(
            explain,
            name="explain",
            max_batch=1,
            max_queue=settings.explain_queue,
            observe=lambda photographs: observed.batch("explain", photographs),
        )

    def start(self) -> None:
        """Begin to answer, and warm the model up."""
        self.standing.state = "starting"
        self._decoders = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="decode")
        self._predictions.start()
        self._explanations.start()
        self._warming = asyncio.get_running_loop().create_task(self._warm())

    async def stop(self) -> None:
        """Stop when what is being done is done."""
        self.standing.stop()
        self._warming.cancel()
        with suppress(asyncio.CancelledError):
            await self._warming
        await self._predictions.stop()
        await self._explanations.stop()
        await asyncio.to_thread(self._decoders.shutdown, cancel_futures=True)
        self._observed.close()

    async def _warm(self) -> None:
        """Answer once: the first answer is slow, and a model that can't answer must not say that it is ready."""
        size = self.predictor.size
        photograph = np.zeros((size, size, 3), dtype=np.uint8) if self.predictor.reads_image else None
        try:
            await self._predictions.predict([photograph], {})
        except Exception as error:
            log.critical("the model can't answer", extra={"error": type(error).__name__, "where": where(error)})
            self.standing.state = "broken"
        else:
            if self.standing.state == "starting":
                self.standing.state = "ready"

    def place(self, room: Room) -> Place:
        """Return a place that isn't taken yet.

        Raises:
            Busy: the room is full, so that the body needn't be read.
        """
        if room.full:
            raise Busy
        return Place(room)

    async def ask(self, images: list[bytes], form: dict[str, Any]) -> Prediction:
        """Classify one lesion; for who isn't bound by HTTP's limits, such as the page."""
        with self.place(self.room) as place:
            place.hold(sum(map(len, images)))
            return await self.predict(images, form, place)

    async def ask_why(self, image: bytes | None, form: dict[str, Any], label: str | None) -> Explanation:
        """Explain one answer; as `ask`."""
        with self.place(self.explain_room) as place:
            place.hold(len(image or b""))
            return (await self.explain(image, form, label, place))[1]

    async def predict(self, images: Sequence[bytes], form: dict[str, Any], place: Place) -> Prediction:
        """Classify one lesion.

        Args:
            images: photographs, as they were sent.
            form: metadata.
            place: holds the bytes; it is entered, and the bytes are given back once they are decoded.

        Raises:
            Busy: there is no place.
            DataError: the form, or the number of photographs, isn't what it must be.
            ImageError: a photograph can't be decoded.
            Refusal: it took too long.
        """
        place.enter()
        self._check(images, form)
        return await self._in_time(self._predict(images, form, place))

    async def explain(
        self, image: bytes | None, form: dict[str, Any], label: str | None, place: Place
    ) -> tuple[Prediction, Explanation]:
        """Classify one lesion and explain the answer; as `predict`.

        Args:
            image: the photograph.
            form: metadata.
            label: the class to explain; None: the likeliest.
            place: as for `predict`.
        """
        place.enter()
        if label is not None and label not in self.predictor.classes:
            raise DataError(f"the model knows no such label; it knows {', '.join(self.predictor.classes)}")
        images = [] if image is None else [image]
        self._check(images, form)

        async def both() -> tuple[Prediction, Explanation]:
            prepared = await self._prepare_all(images, place)
            prediction = await self._predictions.predict(prepared, form)
            question = _Question(prepared[0], form, label or prediction.label)
            return prediction, await self._explanations.submit(question)

        return await self._in_time(both())

    def _check(self, images: Sequence[bytes], form: dict[str, Any]) -> None:
        if images and not self.predictor.reads_image:
            raise DataError("this model reads the metadata alone; send no photograph")
        if not images and self.predictor.needs_image:
            raise DataError("this model needs a photograph; send it as the part images")
        self.predictor.check_metadata(form)

    async def _in_time(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await work
        except TimeoutError:
            self._observed.rejected("timeout")
            raise Refusal(503, "timeout", "the service is too busy to answer in time; ask again", RETRY) from None

    async def _predict(self, images: Sequence[bytes], form: dict[str, Any], place: Place) -> Prediction:
        return await self._predictions.predict(await self._prepare_all(images, place), form)

    async def _prepare_all(self, images: Sequence[bytes], place: Place) -> list[NDArray[np.uint8] | None]:
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._decoders, self._prepare, image) for image in images]
        self._decoding += 1
        try:
            return list(await asyncio.gather(*futures)) or [None]
        finally:
            self._decoding -= 1
            place.drop_body()
            # What hasn't begun needn't, if one of them can't be read or the client has gone.
            for future in futures:
                future.cancel()

    def _prepare(self, image: bytes) -> NDArray[np.uint8] | None:
        pixels = self.predictor.decode(image, max_bytes=self.settings.max_upload, max_pixels=self.settings.max_pixels)
        return self.predictor.prepare(pixels)


async def unless_gone(gone: Callable[[], Coroutine[Any, Any, None]], work: Coroutine[Any, Any, Result]) -> Result:
    """Do some work, and give it up when the client goes away.

    Args:
        gone: a coroutine function that returns when the client has gone.
        work: a coroutine.

    Raises:
        ConnectionAbortedError: the client has gone.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionAbortedError
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await working
