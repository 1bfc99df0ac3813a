# SPDX-License-Identifier: Apache-2.0
"""Tasks that outlive their request."""

from __future__ import annotations

import asyncio
import contextvars
import logging

import pytest

from disagg.gateway.background import Background

_variable: contextvars.ContextVar[str] = contextvars.ContextVar("_variable", default="none")


async def test_a_task_outlives_who_started_it() -> None:
    """A cancelled request takes nothing along, and its context stays behind."""
    background, done, go_on = Background(), [], asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        done.append(_variable.get())

    async def request() -> None:
        _variable.set("of the request")
        background.spawn(work())
        await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    go_on.set()
    await background.close(1)
    assert done == ["none"]


async def test_close_waits_then_cancels() -> None:
    """What finishes in time finishes, the rest is cancelled, and loops are not waited for."""
    background, ended = Background(), []

    async def work(name: str, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
            ended.append(name)
        except asyncio.CancelledError:
            ended.append(f"{name} cancelled")
            raise

    loop = asyncio.get_running_loop()
    background.spawn(work("short", 0.01))
    background.forever(work("loop", 60))
    await asyncio.sleep(0)
    began = loop.time()
    await background.close(5)
    assert loop.time() - began < 1
    assert ended == ["loop cancelled", "short"]
    background.spawn(work("long", 60))
    await background.close(0.01)
    assert ended[-1] == "long cancelled"
    await background.close(1)


async def test_a_loop_that_fails_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a loop is in the log with its traceback; a cancelled one is not."""
    background = Background()

    async def fails() -> None:
        raise ValueError("the reason")

    with caplog.at_level(logging.ERROR):
        await asyncio.gather(background.forever(fails()), return_exceptions=True)
        background.forever(asyncio.sleep(60))
        await background.close(1)
        await asyncio.sleep(0)
    [record] = caplog.records
    assert record.exc_info is not None and "the reason" in str(record.exc_info[1])
