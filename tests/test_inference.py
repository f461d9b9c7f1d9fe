import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.service.inference import Busy, Inference, Limiter, Reservation, Upload, Worker
from dualrefnet.service.observability import Metrics
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings
from live_service import StandInPredictor, picture


class Recorder:
    """Tens its jobs, and records them; a job 3 fails the whole batch if `fails`."""

    def __init__(self, delay: float = 0.0, fails: bool = False) -> None:
        self.delay, self.fails = delay, fails
        self.batches: list[list[int]] = []
        self.begun = threading.Event()

    def __call__(self, jobs: list[int]) -> list[int]:
        self.begun.set()
        self.batches.append(list(jobs))
        time.sleep(self.delay)
        if self.fails and 3 in jobs:
            raise ValueError("three")
        return [10 * job for job in jobs]


def use(worker: Worker, work: Callable[[], Coroutine]) -> Any:
    async def run() -> Any:
        worker.start()
        try:
            return await asyncio.wait_for(work(), 20)
        finally:
            await worker.stop()

    return asyncio.run(run())


def submit_all(worker: Worker, jobs: list[int]) -> list:
    async def work() -> list:
        return await asyncio.gather(*map(worker.submit, jobs), return_exceptions=True)

    return use(worker, work)


def test_jobs_that_arrive_while_the_model_is_busy_form_batches_and_everyone_gets_their_own_result() -> None:
    run = Recorder(delay=0.05)
    assert submit_all(Worker(run, "worker", max_batch=8), list(range(20))) == [10 * job for job in range(20)]
    assert [len(batch) for batch in run.batches] == [8, 8, 4]


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["enter", "receive", "release", "leave"])), max_size=60))
def test_a_limiter_gives_back_what_was_taken_and_is_never_exceeded(steps: list[tuple[int, str]]) -> None:
    limiter = Limiter(3, 10, lambda requests, size: None)
    held: list[Reservation] = []
    for number, step in steps:
        requests, size = limiter.requests, limiter.bytes
        try:
            if step == "enter":
                held.append(Reservation(limiter, number))
            elif held and step == "receive":
                held[number % len(held)].receive(number)
            elif held and step == "release":
                held[number % len(held)].release_body()
            elif held:
                held.pop(number % len(held)).__exit__()
        except Busy:
            assert requests == 3 or size + number > 10
            assert (limiter.requests, limiter.bytes) == (requests, size)
        assert 0 <= limiter.requests <= 3
        assert 0 <= limiter.bytes <= 10
    for reservation in held:
        reservation.__exit__()
    assert (limiter.requests, limiter.bytes) == (0, 0)


def serve(inference: Inference, work: Callable[[], Coroutine]) -> Any:
    async def run() -> Any:
        inference.start()
        try:
            while inference.state == "starting":
                await asyncio.sleep(0.01)
            return await asyncio.wait_for(work(), 30)
        finally:
            await inference.stop()
            assert (inference.limiter.requests, inference.limiter.bytes) == (0, 0)

    return asyncio.run(run())


async def predict(inference: Inference) -> Any:
    with Reservation(inference.limiter, 100) as reservation:
        return await inference.predict(Upload([picture()], {}), reservation)


def test_what_takes_too_long_is_refused_and_dropped_from_the_queue() -> None:
    predictor = StandInPredictor(delay=0.3)
    inference = Inference(predictor, ServiceSettings(timeout=0.45, max_batch=1), Metrics())

    async def work() -> list:
        return await asyncio.gather(*(predict(inference) for _ in range(4)), return_exceptions=True)

    refused = [result for result in serve(inference, work) if isinstance(result, Refusal)]
    assert len(refused) == 3
    assert all(refusal.status == 503 and refusal.headers["Retry-After"] == "1" for refusal in refused)
    # The warm-up, one in time, and one that had begun before its time was over.
    assert len(predictor.batches) == 3


@pytest.mark.parametrize("own_model", [True, False])
def test_explanations_delay_predictions_only_if_they_share_the_model(own_model: bool) -> None:
    class Slow(StandInPredictor):
        def explain_array(self, *arguments: Any) -> Any:
            time.sleep(0.6)
            return super().explain_array(*arguments)

    slow = Slow()
    inference = Inference(
        StandInPredictor() if own_model else slow, ServiceSettings(), Metrics(), slow if own_model else None
    )

    async def explain() -> Any:
        with Reservation(inference.explain_limiter, 100) as reservation:
            return await inference.explain(Upload([picture()], {}, "NEV"), reservation)

    async def work() -> float:
        explaining = asyncio.ensure_future(explain())
        await asyncio.sleep(0.15)
        started = time.perf_counter()
        await predict(inference)
        seconds = time.perf_counter() - started
        assert (await explaining)[1].label == "NEV"
        return seconds

    assert (serve(inference, work) < 0.3) == own_model


def test_a_model_that_fails_is_never_ready() -> None:
    class Broken(StandInPredictor):
        def answer(self, *arguments: Any) -> Any:
            raise RuntimeError("out of memory")

    inference = Inference(Broken(), ServiceSettings(), Metrics())

    async def state() -> str:
        return inference.readiness

    assert serve(inference, state) == "broken"
