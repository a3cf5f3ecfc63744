"""One run: a subject on freshly started machines, with the people of a scenario; and many runs, some side by side."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.bench.fleet import figures, foreign_boxes
from tests.bench.fleet.installation import Gateway, Installation
from tests.bench.fleet.programs import Waiting, cpu_s, serving
from tests.bench.fleet.rules import RULES
from tests.bench.fleet.scenario import Durations, Scenario

FOREIGN_SETTLES_S = 3.0
Result = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A rule of others, this gateway with a routing, or a foreign server by its address."""

    name: str
    rule: str = ""
    routing: str = ""
    workers: int = 1
    url: str = ""


@dataclass(frozen=True)
class Job:
    """`variant` names what differs from the plain run: groups that stay away, or the clock of reported durations."""

    subject: Subject
    scenario: Scenario
    round: int = 0
    variant: str = ""
    without: tuple[str, ...] = ()
    durations: Durations = "own"

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.scenario.name, self.subject.name, self.variant)))


@dataclass
class Runner:
    installation: Installation
    speed: float
    seed: int
    base_port: int
    foreign_keys: Mapping[str, str]
    box_program: str = ""
    _base_port_in_use: threading.Lock = field(default_factory=threading.Lock)

    def run(self, job: Job) -> Result:
        with ExitStack() as stack:
            if job.subject.url:
                stack.enter_context(self._base_port_in_use)
            people = [stack.enter_context(self._people(job)) for _ in range(job.scenario.slices)]
            urls = stack.enter_context(self._boxes(job))
            url, gateway = stack.enter_context(self._subject(job, urls))
            pids = gateway.pids if gateway else []
            keys = gateway.keys if gateway else self.foreign_keys
            rows, costs = [], []
            for one in people:
                before = cpu_s(pids)
                rows += (answered := one.begin({"url": url, "keys": keys}))
                costs.append((cpu_s(pids) - before) / max(1, len(answered)))
            counts = [httpx.get(f"{one}/_stats").json() for one in urls]
            audit = gateway.audit_rows() if gateway else []
        return self._result(job, rows, counts, figures.gateway(audit, min(costs)) if gateway else {})

    def _result(self, job: Job, rows: figures.Rows, counts: Sequence[figures.Figures], gateway: figures.Figures) -> Result:
        present = [row for row in rows if row["who"] not in job.without]
        return {
            "scenario": job.scenario.name,
            "subject": job.subject.name,
            "variant": job.variant,
            "round": job.round,
            "groups": figures.groups(present, job.scenario.seconds * job.scenario.slices),
            "fleet": figures.fleet(counts, job.scenario),
            "gateway": gateway,
            **({"served": figures.served(rows, job.scenario)} if job.scenario.name == "fairness" else {}),
        }

    @contextmanager
    def _boxes(self, job: Job) -> Iterator[list[str]]:
        port = self.base_port if job.subject.url else 0
        if self.box_program:
            with foreign_boxes.serving(self.box_program, job.scenario, self.speed, port) as urls:
                yield urls
            return
        words = ["--speed", str(self.speed), "--durations", job.durations, "--base-port", str(port)]
        with serving("boxes", str(job.scenario.file), *words) as (urls, _):
            yield urls

    @contextmanager
    def _subject(self, job: Job, urls: Sequence[str]) -> Iterator[tuple[str, Gateway | None]]:
        subject = job.subject
        if subject.url:
            threading.Event().wait(FOREIGN_SETTLES_S)
            yield subject.url, None
        elif subject.rule:
            with serving("router", subject.rule, *urls, "--speed", str(self.speed)) as (url, _):
                yield url, None
        else:
            with self.installation.gateway(job.scenario, urls, subject.routing, subject.workers) as gateway:
                yield gateway.url, gateway

    def _people(self, job: Job) -> Waiting:
        words = ["--speed", str(self.speed), "--seed", str(self.seed + job.round)]
        words += ["--without", *job.without] if job.without else []
        return Waiting("traffic", str(job.scenario.file), *words)


def subject_of(name: str) -> Subject:
    """`random`, …; `gateway-fast`, `gateway-order-4`; `name=http://…`."""
    if "=" in name:
        title, _, url = name.partition("=")
        return Subject(title, url=url.rstrip("/"))
    if name in RULES:
        return Subject(name, rule=name)
    kind, _, rest = name.partition("-")
    routing, _, workers = rest.partition("-")
    if kind != "gateway" or routing not in ("order", "warm", "fast") or not (workers or "1").isdecimal():
        raise ValueError(f"no subject {name!r}: {', '.join(RULES)}, gateway-order, gateway-warm, gateway-fast, gateway-fast-4")
    return Subject(name, routing=routing, workers=int(workers or 1))


def run_everything(runner: Runner, jobs: Sequence[Job], side_by_side: int, progress: Progress) -> list[Result]:
    """Those that measure processor time come last, one by one."""
    exact = [job for job in jobs if job.scenario.slices > 1]
    others = [job for job in jobs if job.scenario.slices == 1]
    return [*run_all(runner, others, side_by_side, progress), *run_all(runner, exact, 1, progress)]


def run_all(runner: Runner, jobs: Sequence[Job], side_by_side: int, progress: Progress) -> list[Result]:
    """In the order of the jobs."""
    done = 0
    lock = threading.Lock()

    def run(job: Job) -> Result:
        nonlocal done
        result = runner.run(job)
        with lock:
            done += 1
            progress(f"{done:3} of {len(jobs)}  {line(result)}")
        return result

    if any(job.subject.routing for job in jobs):
        threading.Thread(target=runner.installation.prepare, daemon=True).start()
    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(run, jobs))


def line(result: Result) -> str:
    every, fleet = result["groups"][figures.ALL], result["fleet"]
    who = " ".join(filter(None, (result["scenario"], result["subject"], result["variant"])))
    waits = "no answers" if every["ttft_p95"] is None else f"p50 {every['ttft_p50']:.2f} p95 {every['ttft_p95']:.2f}"
    failed = f", {every['failed']} failed" if every["failed"] else ""
    return f"{who}: {every['requests']} calls{failed}, {waits}, {every['tokens_s']:.0f} tokens/s, {fleet['loads']} loads"
