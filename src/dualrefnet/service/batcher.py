"""Many small requests, read by the model together: a bounded queue before one thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dualrefnet.deploy.predictor import Prediction

Job = TypeVar("Job")
Result = TypeVar("Result")
Photographs = Sequence[NDArray[np.uint8] | None]


class Busy(Exception):
    """There is no place for another request; ask again a little later."""


class Room:
    """Places for requests, bounded in their number and in the bytes of their bodies. For one event loop.

    Attributes:
        requests: how many are held.
        size: bytes that they hold.
    """

    def __init__(self, max_requests: int, max_size: int, tell: Callable[[int, int], None] | None = None) -> None:
        self.max_requests, self.max_size, self._tell = max_requests, max_size, tell
        self.requests = self.size = 0

    @property
    def full(self) -> bool:
        """Whether another request would find no place."""
        return self.requests >= self.max_requests

    def change(self, requests: int, size: int) -> None:
        """Take places, or give them back.

        Raises:
            Busy: there are not as many; nothing is taken.
        """
        if (requests > 0 and self.requests + requests > self.max_requests) or (
            size > 0 and self.size + size > self.max_size
        ):
            raise Busy
        self.requests += requests
        self.size += size
        if self._tell:
            self._tell(self.requests, self.size)


class Place:
    """What one request takes of a room; leaving the block gives everything back."""

    def __init__(self, room: Room) -> None:
        self._room, self._requests, self._size = room, 0, 0

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._room.change(-self._requests, -self._size)

    def hold(self, size: int) -> None:
        """Count bytes of the body as they come; raises `Busy`."""
        self._room.change(0, size)
        self._size += size

    def enter(self) -> None:
        """Count the request, whose body is there now; raises `Busy`."""
        self._room.change(1, 0)
        self._requests += 1

    def drop_body(self) -> None:
        """The body isn't held any more."""
        self._room.change(0, -self._size)
        self._size = 0


class Lane(Generic[Job, Result]):
    """Jobs that wait for one thread, which does several at once.

    A lone job starts at once. What comes while the thread works is taken together when it is done; only if `soon` says
    that more
    jobs are about to come does an idle thread wait for them, `max_wait` seconds at most.
    """

    def __init__(
        self,
        work: Callable[[list[Job]], list[Result]],
        *,
        name: str,
        weight: Callable[[Job], int] = lambda job: 1,
        max_batch: int = 16,
        max_wait: float = 0.002,
        max_queue: int = 64,
        soon: Callable[[], int] = lambda: 0,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        """Make a lane; it works from `start` on.

        Args:
            work: answers jobs, as many answers as jobs; runs in the thread.
            name: of the thread.
            weight: how much a job counts in a batch.
            max_batch: most weight of a batch; a heavier job goes alone.
            max_wait: seconds to wait for jobs that are about to come.
            max_queue: most jobs that wait.
            soon: how many jobs are about to come.
            observe: called with the weight of every batch.
        """
        self._work, self._weight, self._soon, self._observe = work, weight, soon, observe
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._name = name
        self._waiting: deque[tuple[Job, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """Begin to work; call it in the event loop."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self._name)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Stop, when what the thread does now is done; what waits is cancelled."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)

    async def submit(self, job: Job) -> Result:
        """Answer a job; if the caller is cancelled before it has begun, it is dropped.

        Raises:
            Busy: too many jobs wait.
        """
        if len(self._waiting) >= self.max_queue:
            raise Busy
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        entry = (job, future)
        self._waiting.append(entry)
        self._arrived.set()
        try:
            return await future
        finally:
            # Only what was cancelled is still there.
            with suppress(ValueError):
                self._waiting.remove(entry)

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._wait_for_more()
            batch = self._take()
            if batch:
                await self._answer(batch)

    async def _wait_for_more(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait):
                while self._soon() > 0 and sum(self._weight(job) for job, _ in self._waiting) < self.max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()

    def _take(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        batch: list[tuple[Job, asyncio.Future[Result]]] = []
        room = self.max_batch
        while self._waiting and (not batch or self._weight(self._waiting[0][0]) <= room):
            batch.append(self._waiting.popleft())
            room -= self._weight(batch[-1][0])
        if self._waiting:
            self._arrived.set()
        else:
            self._arrived.clear()
        return batch

    async def _answer(self, batch: list[tuple[Job, asyncio.Future[Result]]]) -> None:
        loop = asyncio.get_running_loop()
        jobs = [job for job, _ in batch]
        if self._observe:
            self._observe(sum(self._weight(job) for job in jobs))
        try:
            results = await loop.run_in_executor(self._thread, self._work, jobs)
        except Exception as error:
            if len(batch) == 1:
                _settle(batch[0][1], error=error)
                return
            # One of them spoils the batch; alone it spoils nothing but itself.
            for entry in batch:
                await self._answer([entry])
            return
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        for (_, future), result in zip(batch, results, strict=True):
            _settle(future, result)


def _settle(future: asyncio.Future[Result], result: Result | None = None, error: Exception | None = None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Lesion:
    """The photographs of one lesion, prepared, and its form."""

    photographs: Photographs
    form: Mapping[str, Any]


class Batcher(Lane[Lesion, "Prediction"]):
    """The lane of predictions."""

    def __init__(
        self, predict: Callable[[list[Photographs], list[Mapping[str, Any]]], list[Prediction]], **settings: Any
    ) -> None:
        """Make a batcher.

        Args:
            predict: such as `Predictor.predict_lesions`.
            settings: of the `Lane`.
        """

        def work(lesions: list[Lesion]) -> list[Prediction]:
            return predict([lesion.photographs for lesion in lesions], [lesion.form for lesion in lesions])

        super().__init__(work, name="predict", weight=lambda lesion: len(lesion.photographs), **settings)

    async def predict(self, photographs: Photographs, form: Mapping[str, Any]) -> Prediction:
        """Classify one lesion, together with others that wait.

        Raises:
            Busy: too many wait.
        """
        return await self.submit(Lesion(photographs, form))
