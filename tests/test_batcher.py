import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualrefnet.service.answering import Answering
from dualrefnet.service.batcher import Batcher, Busy, Lane, Place, Room
from dualrefnet.service.observability import Observed
from dualrefnet.service.schemas import Refusal
from dualrefnet.service.settings import ServiceSettings
from live_service import StandInPredictor, picture


def grey(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, dtype=np.uint8)


async def with_lane(lane: Lane, use: Callable[[], Coroutine]) -> Any:
    lane.start()
    try:
        return await asyncio.wait_for(use(), 20)
    finally:
        await lane.stop()


def test_what_comes_while_the_model_works_is_answered_together_and_everyone_gets_his_own() -> None:
    predictor = StandInPredictor(delay=0.05)
    batcher = Batcher(predictor.predict_lesions, max_batch=8)

    async def ask() -> list:
        return await asyncio.gather(*(batcher.predict([grey(value)], {"age": value}) for value in range(20)))

    answers = asyncio.run(with_lane(batcher, ask))
    assert [answer.warnings for answer in answers] == [[f"age {value}"] for value in range(20)]
    assert [answer.malignancy for answer in answers] == pytest.approx([value / 255 for value in range(20)])
    assert predictor.batches == [8, 8, 4]
    assert predictor.threads == {"predict_0"}


def test_a_lone_request_never_waits_for_company() -> None:
    seconds = 5.0
    batcher = Batcher(StandInPredictor().predict_lesions, max_wait=seconds)

    async def ask() -> float:
        started = time.perf_counter()
        for _ in range(10):
            await batcher.predict([grey(1)], {})
        return time.perf_counter() - started

    assert asyncio.run(with_lane(batcher, ask)) < seconds / 2


def test_an_idle_model_waits_a_moment_for_what_is_being_decoded() -> None:
    predictor = StandInPredictor()
    decoding = 2
    batcher = Batcher(predictor.predict_lesions, max_wait=5.0, soon=lambda: decoding)

    async def later() -> None:
        nonlocal decoding
        await asyncio.sleep(0.1)
        decoding = 0
        await batcher.predict([grey(2)], {})

    async def ask() -> None:
        await asyncio.gather(batcher.predict([grey(1)], {}), later())

    asyncio.run(with_lane(batcher, ask))
    assert predictor.batches == [2]


def test_the_wait_for_what_is_being_decoded_ends() -> None:
    batcher = Batcher(StandInPredictor().predict_lesions, max_wait=0.02, soon=lambda: 1)

    async def ask() -> float:
        started = time.perf_counter()
        await asyncio.gather(*(batcher.predict([grey(1)], {}) for _ in range(40)))
        return time.perf_counter() - started

    assert asyncio.run(with_lane(batcher, ask)) < 5


def test_a_lesion_with_many_photographs_counts_as_many_and_goes_alone_if_it_must() -> None:
    predictor = StandInPredictor(delay=0.02)
    batcher = Batcher(predictor.predict_lesions, max_batch=4)

    async def ask() -> None:
        await asyncio.gather(*(batcher.predict([grey(1)] * number, {}) for number in (1, 6, 2, 2, 1)))

    asyncio.run(with_lane(batcher, ask))
    assert predictor.batches == [1, 6, 4, 1]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room() -> None:
    release = threading.Event()
    lane: Lane[int, int] = Lane(
        lambda jobs: [job for job in jobs if release.wait(20)], name="lane", max_batch=1, max_queue=3
    )

    async def ask() -> list:
        first = asyncio.ensure_future(lane.submit(0))
        await asyncio.sleep(0.05)
        waiting = [asyncio.ensure_future(lane.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await lane.submit(4)
        waiting[1].cancel()
        await asyncio.sleep(0)
        again = asyncio.ensure_future(lane.submit(5))
        await asyncio.sleep(0)
        release.set()
        return await asyncio.gather(first, *waiting, again, return_exceptions=True)

    answers = asyncio.run(with_lane(lane, ask))
    assert isinstance(answers.pop(2), asyncio.CancelledError)
    assert answers == [0, 1, 3, 5]


def test_who_is_cancelled_before_his_turn_costs_the_model_nothing() -> None:
    done: list[int] = []
    started = threading.Event()

    def work(jobs: list[int]) -> list[int]:
        started.set()
        time.sleep(0.05)
        done.extend(jobs)
        return jobs

    lane: Lane[int, int] = Lane(work, name="lane", max_batch=1)

    async def ask() -> None:
        first = asyncio.ensure_future(lane.submit(1))
        await asyncio.to_thread(started.wait)
        second, third = asyncio.ensure_future(lane.submit(2)), asyncio.ensure_future(lane.submit(3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, third)

    asyncio.run(with_lane(lane, ask))
    assert done == [1, 3]


def test_one_bad_job_fails_alone() -> None:
    def work(jobs: list[int]) -> list[int]:
        time.sleep(0.02)
        if 3 in jobs:
            raise ValueError("three")
        return [10 * job for job in jobs]

    lane: Lane[int, int] = Lane(work, name="lane")

    async def ask() -> list:
        return await asyncio.gather(*(lane.submit(number) for number in range(6)), return_exceptions=True)

    answers = asyncio.run(with_lane(lane, ask))
    assert isinstance(answers.pop(3), ValueError)
    assert answers == [0, 10, 20, 40, 50]


@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["enter", "hold", "drop", "leave"])), max_size=60))
def test_a_room_gives_back_what_was_taken_and_never_more_is_in_it(steps: list[tuple[int, str]]) -> None:
    room = Room(3, 10)
    places: list[Place] = []
    for number, step in steps:
        if step == "enter":
            place = Place(room)
            try:
                place.enter()
            except Busy:
                assert room.full
            places.append(place)
        elif places:
            place = places[number % len(places)]
            if step == "hold":
                before = room.size
                try:
                    place.hold(number)
                except Busy:
                    assert before + number > 10
                    assert room.size == before
            elif step == "drop":
                place.drop_body()
            else:
                place.__exit__(None, None, None)
                places.remove(place)
        assert 0 <= room.requests <= 3
        assert 0 <= room.size <= 10
    for place in places:
        place.__exit__(None, None, None)
    assert (room.requests, room.size) == (0, 0)


async def answered(
    predictor: StandInPredictor, settings: ServiceSettings, use: Callable[[Answering], Coroutine]
) -> Any:
    service = Answering(predictor, settings, Observed())
    service.start()
    try:
        return await asyncio.wait_for(use(service), 30)
    finally:
        await service.stop()
        assert (service.room.requests, service.room.size) == (0, 0)


def test_what_takes_too_long_is_refused_and_dropped_from_the_queue() -> None:
    predictor = StandInPredictor(delay=0.3)
    settings = ServiceSettings(timeout=0.45, max_batch=1)

    async def use(service: Answering) -> list:
        while service.standing.state != "ready":
            await asyncio.sleep(0.01)
        return await asyncio.gather(*(service.ask([picture()], {}) for _ in range(4)), return_exceptions=True)

    answers = asyncio.run(answered(predictor, settings, use))
    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    assert len(refused) == 3
    assert all(refusal.status == 503 and refusal.headers["Retry-After"] == "1" for refusal in refused)
    # The warm-up, one in time, and one that was begun before its time was over.
    assert len(predictor.batches) == 3


def test_explanations_have_a_thread_of_their_own_only_if_they_have_a_model_of_their_own() -> None:
    async def use(service: Answering) -> float:
        explaining = asyncio.ensure_future(service.ask_why(picture(), {}, "NEV"))
        await asyncio.sleep(0.15)
        started = time.perf_counter()
        await service.ask([picture()], {})
        seconds = time.perf_counter() - started
        assert (await explaining).label == "NEV"
        return seconds

    class Slow(StandInPredictor):
        def explain_array(self, *arguments: Any) -> Any:
            time.sleep(0.6)
            return super().explain_array(*arguments)

    async def alone() -> float:
        service = Answering(StandInPredictor(), ServiceSettings(), Observed(), Slow())
        service.start()
        try:
            return await use(service)
        finally:
            await service.stop()

    assert asyncio.run(answered(Slow(), ServiceSettings(), use)) > 0.3
    assert asyncio.run(alone()) < 0.3


def test_a_model_that_cannot_answer_is_never_ready() -> None:
    class Broken(StandInPredictor):
        def predict_lesions(self, *arguments: Any) -> Any:
            raise RuntimeError("out of memory")

    async def use(service: Answering) -> str:
        while service.standing.state == "starting":
            await asyncio.sleep(0.01)
        return service.standing.state

    assert asyncio.run(answered(Broken(), ServiceSettings(), use)) == "broken"
