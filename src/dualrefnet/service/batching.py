"""Bounded admission of requests, and a worker that runs them through the model in batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Busy(Exception):
    """The limiter is full; the client should retry a little later."""


class Limiter:
    """Bounds the number of requests and the bytes of their bodies. For one event loop."""

    def __init__(self, max_requests: int, max_bytes: int, observe: Callable[[int, int], None] | None = None) -> None:
        self._max_requests, self._max_bytes, self._observe = max_requests, max_bytes, observe
        self.requests = self.bytes = 0

    @property
    def full(self) -> bool:
        return self.requests >= self._max_requests

    def reserve(self) -> Reservation:
        """Return an empty reservation; raises `Busy` when full, before the body is read."""
        if self.full:
            raise Busy
        return Reservation(self)

    def change(self, requests: int, size: int) -> None:
        """Take requests and bytes, or give them back; if they don't fit nothing is taken, and `Busy` is raised."""
        if requests > 0 and self.requests + requests > self._max_requests:
            raise Busy
        if size > 0 and self.bytes + size > self._max_bytes:
            raise Busy
        self.requests += requests
        self.bytes += size
        if self._observe:
            self._observe(self.requests, self.bytes)


class Reservation:
    """What one request takes of a limiter; leaving the block gives everything back."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter, self._requests, self._bytes = limiter, 0, 0

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *error: object) -> None:
        self._limiter.change(-self._requests, -self._bytes)

    def hold(self, size: int) -> None:
        """Count bytes of the body as they arrive."""
        self._limiter.change(0, size)
        self._bytes += size

    def enter(self) -> None:
        """Count the request, once its body is complete."""
        self._limiter.change(1, 0)
        self._requests += 1

    def release_body(self) -> None:
        """The body has been decoded and is no longer held."""
        self._limiter.change(0, -self._bytes)
        self._bytes = 0


class Worker(Generic[Job, Result]):
    """Runs jobs in one thread, in batches.

    A lone job starts at once; what arrives while the thread is busy forms the next batch. Only if `expected` says that
    more jobs are on their way does an idle thread wait for them, `max_wait` seconds at most.

    Args:
        run: jobs -> as many results; called in the thread.
        name: of the thread.
        max_batch: largest total size of a batch; a larger job runs alone.
        size: of a job.
        expected: how many jobs are about to arrive.
        observe: called with the size of each batch.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], list[Result]],
        name: str,
        *,
        max_batch: int = 1,
        max_wait: float = 0.0,
        size: Callable[[Job], int] = lambda job: 1,
        expected: Callable[[], int] = lambda: 0,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._name, self._size, self._expected, self._observe = run, name, size, expected, observe
        self._max_batch, self._max_wait = max_batch, max_wait
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
        entry = (job, future)
        self._waiting.append(entry)
        self._arrived.set()
        try:
            return await future
        finally:
            with suppress(ValueError):
                self._waiting.remove(entry)

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._max_wait):
                    while self._expected() and sum(self._size(job) for job, _ in self._waiting) < self._max_batch:
                        self._arrived.clear()
                        await self._arrived.wait()
            batch = self._next_batch()
            if batch:
                await self._run_batch(batch)

    def _next_batch(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        batch: list[tuple[Job, asyncio.Future[Result]]] = []
        left = self._max_batch
        while self._waiting and (not batch or self._size(self._waiting[0][0]) <= left):
            batch.append(self._waiting.popleft())
            left -= self._size(batch[-1][0])
        if self._waiting:
            self._arrived.set()
        else:
            self._arrived.clear()
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
