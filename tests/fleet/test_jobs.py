"""Jobs: their tasks run at the same time, one failure ends no other, and the end of a job ends its tasks."""

import asyncio
from collections.abc import Sequence

import pytest

from gateway.fleet import jobs
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.jobs import Changes, Job, Progress, Rows, TaskFailed


async def finish_nothing(_: Sequence[str]) -> None:
    return


def run(job: Job) -> list[Rows]:
    async def all_of_it() -> list[Rows]:
        async with job:
            return [rows async for rows in job.progress()]

    return asyncio.run(all_of_it())


def test_tasks_run_at_the_same_time_and_fail_alone() -> None:
    refreshed: list[Sequence[str]] = []

    async def finish(backends: Sequence[str]) -> None:
        refreshed.append(backends)

    both = asyncio.Event()

    async def first(progress: Progress) -> None:
        progress.note("waits", percent=1)
        await asyncio.wait_for(both.wait(), 5)
        progress.note("there", percent=100)

    async def second(progress: Progress) -> None:
        both.set()
        raise TaskFailed("no room")

    async def third(progress: Progress) -> None:
        raise BackendFault("unreachable", "ConnectionRefusedError")

    job = Job(finish)
    for backend, task in (("alpha", first), ("beta", second), ("gamma", third)):
        job.add(backend, "m", task, percent=None)
    last = run(job)[-1]
    assert [(row["backend"], row["state"], row["detail"], row["percent"]) for row in last] == [
        ("alpha", "done", "there", 100),
        ("beta", "failed", "no room", None),
        ("gamma", "failed", "unreachable: ConnectionRefusedError", None),
    ]
    assert (jobs.failed(last), refreshed) == (["beta", "gamma"], [["alpha"]])


def test_an_unexpected_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(progress: Progress) -> None:
        raise RuntimeError("a secret")

    job = Job(finish_nothing)
    job.add("alpha", "m", broken)
    [row] = run(job)[-1]
    assert row["state"] == "failed" and "secret" not in row["detail"] and "a secret" in caplog.text


def test_progress_is_reported_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BEAT_S", 0.02)
    monkeypatch.setattr(jobs, "SHORTEST_BEAT_S", 0.01)

    async def slow(progress: Progress) -> None:
        await asyncio.sleep(0.2)

    job = Job(finish_nothing)
    job.add("alpha", "m", slow)
    reports = run(job)
    assert len(reports) >= 4 and len([row for rows in reports for row in Changes().among(rows)]) == len(reports)
    changes = Changes()
    assert [row["state"] for rows in reports for row in changes.among(rows)] == ["running", "done"]


def test_the_end_of_a_job_ends_its_tasks() -> None:
    async def work() -> list[str]:
        ended: list[str] = []

        async def endless(progress: Progress) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(progress.backend)

        job = Job(finish_nothing)
        for backend in ("alpha", "beta"):
            job.add(backend, "m", endless)
        async with job:
            async for _ in job.progress():
                break
            await asyncio.sleep(0)
        assert jobs.failed(job.rows) == ["alpha", "beta"]
        return ended

    assert sorted(asyncio.run(work())) == ["alpha", "beta"]
