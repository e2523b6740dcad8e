"""Users of an OpenAI-compatible server that ask about pictures, for Locust.

    locust -f loadtests/locustfile.py --host http://localhost:8000 --headless -u 8 -r 8 -t 2m --stop-timeout 2m \\
        --out build/load --pruning balanced --slo-ttft-p99-ms 800 FreshImages Conversations

Closed loop (default): users ask again as soon as they have their answer. Open loop (``--rate``): requests are due at
fixed times, independent of earlier answers. The user who has been idle for longest sends the next one; if all are busy,
it is sent late, but its times count from when it was due. So ``--users`` limits the requests in flight and should be
large. Requests due or in flight at the end count as failed. The same ``--seed`` gives the same pictures, questions and
schedule. At the end, ``--out`` holds

- ``requests.jsonl``: the measurements of each request (`vllm_vtprune_evaluation.load.records`),
- ``result.json``: the results under the names of ``vllm bench serve`` (`vllm_vtprune_evaluation.load.results`),
- ``report.html``: tables and plots.

Locust's exit status is 1 if a request failed, an objective (``--slo-...``) was missed or ``--pruning`` had no effect,
2 for an invalid option or a missing server. Locust's own table shows rounded end-to-end times.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import gevent
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import STATE_CLEANUP, LocalRunner

from loadtests.options import add_slo_arguments, p99_limits, policy, positive
from loadtests.pace import ARRIVALS, Pulse, Schedule, moments
from loadtests.report import write_report
from loadtests.workload import LENGTHS, PIXELS, POLICIES, SIZES, Conversation, picture, question
from vllm_vtprune_evaluation.load.client import ServerMissing, ask, connect, served_model, wall_clock
from vllm_vtprune_evaluation.load.records import Record, save_records
from vllm_vtprune_evaluation.load.results import broken, result
from vllm_vtprune_evaluation.messages import Message, message
from vllm_vtprune_evaluation.options import count, size

log = logging.getLogger("loadtests")
logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for every request
records: list[Record] = []


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Add our options to Locust's."""
    group = parser.add_argument_group("vllm-vtprune")
    group.add_argument("--out", type=Path, metavar="DIR", help="where the results go; without it, none are written")
    group.add_argument("--label", default="run", help="the name of this run in the results (default: run)")
    group.add_argument("--seed", type=int, default=0, help="of pictures, questions and arrivals (default: 0)")
    group.add_argument(
        "--pruning",
        type=policy,
        metavar="POLICY",
        help="a preset or a policy as JSON, sent with every request but those of PolicyMix (default: the field is not "
        "sent)",
    )
    group.add_argument(
        "--rate", type=positive, metavar="N", help="requests per second of all users, open loop (default: closed loop)"
    )
    group.add_argument(
        "--arrivals",
        choices=ARRIVALS,
        default="poisson",
        help="how requests are spread at a constant rate (default: poisson)",
    )
    group.add_argument("--max-tokens", type=count, default=16, metavar="N", help="tokens of every answer (default: 16)")
    group.add_argument(
        "--picture",
        type=size,
        default=PIXELS,
        metavar="WIDTHxHEIGHT",
        help="pixels of every picture but those of ImageSizes (default: {}x{})".format(*PIXELS),
    )
    group.add_argument(
        "--timeout",
        type=positive,
        default=120.0,
        metavar="SECONDS",
        help="without a byte from the server, after which a request has failed (default: 120)",
    )
    add_slo_arguments(group)


@events.init.add_listener
def look_at_server(environment: Environment, **_: Any) -> None:
    """Exit if no server answers, or if several processes would share the results."""
    picture(0)  # import its dependencies now: concurrent imports in gevent's threads may deadlock
    if not isinstance(environment.runner, LocalRunner):
        refuse("one process gathers the results: run without --processes, --master and --worker")
    if not environment.host:
        refuse("--host is missing, the server's address, such as http://localhost:8000")
    environment.host = environment.host.rstrip("/")
    try:
        ChatUser.model = served_model(environment.host)
    except ServerMissing as error:
        refuse(str(error))


def refuse(why: str) -> None:
    """Exit with status 2."""
    print(f"loadtests: {why}", file=sys.stderr)
    sys.exit(2)


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Reset the state of an earlier run started from Locust's web interface."""
    options = environment.parsed_options
    records.clear()
    ChatUser.numbers.clear()
    ChatUser.pulse = Pulse()
    if options.rate is not None:
        after = moments(options.rate, options.arrivals, options.seed)
        ChatUser.schedule = Schedule(after, environment.runner.target_user_count)


@events.test_stopping.add_listener
def count_unsent(environment: Environment, **_: Any) -> None:
    """Record due requests that were never sent, because all users were busy."""
    if environment.parsed_options.rate is not None:
        for due in ChatUser.schedule.unsent(until=ChatUser.pulse.last):
            keep(environment, broken_off("unsent", due, "not sent: all users were busy to the end", lag=None))


@events.test_stop.add_listener
def stop_pulse(**_: Any) -> None:
    """Stop the background greenlet."""
    ChatUser.pulse.stop()


def broken_off(name: str, due: float, error: str, *, lag: float | None) -> Record:
    """The record of a request that fails now; ``due`` is on `time.perf_counter`."""
    return Record(name, wall_clock(due), time.perf_counter() - due, error=error, lag=lag)


def keep(environment: Environment, record: Record) -> None:
    """Add a request to our results and Locust's."""
    records.append(record)
    environment.events.request.fire(
        request_type="chat",
        name=record.name,
        response_time=1000 * record.elapsed,
        response_length=len(record.text),
        exception=None if record.error is None else RuntimeError(record.error),
        context={},
    )


@events.quitting.add_listener
def conclude(environment: Environment, **_: Any) -> None:
    """Write the results, log failures and missed objectives, and set the exit status."""
    options = environment.parsed_options
    if options.out is not None:
        summed = result(
            records,
            model=ChatUser.model,
            label=options.label,
            users=sum(ChatUser.numbers.values()),
            rate=options.rate,
            arrivals=None if options.rate is None else options.arrivals,
            goodput=options.goodput,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        save_records(options.out / "requests.jsonl", records)
        (options.out / "result.json").write_text(json.dumps(summed, indent=1) + "\n")
        write_report(options.out / "report.html", {options.label: summed}, {options.label: records})
        log.info("results in %s", options.out)
    complaints = broken(records, p99_limits(options), options.pruning)
    for complaint in complaints:
        log.error("%s", complaint)
    environment.process_exit_code = 1 if complaints else 0


class ChatUser(User):
    """Asks one question after the other; a subclass defines them."""

    abstract = True
    model: ClassVar[str]
    numbers: ClassVar[Counter[str]] = Counter()
    pulse: ClassVar[Pulse]
    schedule: ClassVar[Schedule]  # at a constant rate

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        kind = type(self).__name__
        self.random = Random(f"{options.seed} {kind} {self.numbers[kind]}")
        self.numbers[kind] += 1
        self.pruning = options.pruning
        self.max_tokens = options.max_tokens
        self.size = options.picture
        self.client = connect(environment.host, timeout=options.timeout)
        self.next: list[Message] = []
        self.due: float | None = None
        super().__init__(environment)

    def on_start(self) -> None:
        self.wait()  # also before the first request

    def wait_time(self) -> float:
        """Create the next request (in a thread, to keep other users' timestamps exact); seconds until it is due."""
        self.next = gevent.get_hub().threadpool.apply(self.messages)
        if self.environment.parsed_options.rate is None:
            return 0.0
        self.due = self.schedule.take()
        return max(0.0, self.due - time.perf_counter())

    def on_stop(self) -> None:
        self.client.close()

    def messages(self) -> list[Message]:
        """The messages of the next request."""
        raise NotImplementedError

    def new_picture(self) -> str:
        """A picture that was never sent before, as a URL."""
        return picture(self.random.getrandbits(32), self.size)

    def answered(self, record: Record) -> None:
        """Called with each finished request."""

    @task
    def ask(self) -> None:
        if self.environment.runner.state == STATE_CLEANUP:
            raise StopUser  # some users wake up before Locust stops them
        if self.due is not None:
            self.schedule.sent(self.due)
        body: dict[str, Any] = {
            "model": self.model, "messages": self.next, "max_tokens": self.max_tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        if self.pruning is not None:
            body["pruning"] = self.pruning
        sent = time.perf_counter()
        kind = type(self).__name__
        try:
            record = ask(self.client, kind, body, self.due)
        except gevent.GreenletExit:
            due = sent if self.due is None else self.due
            keep(self.environment, broken_off(kind, due, "unfinished when the run was over", lag=sent - due))
            raise
        keep(self.environment, replace(record, stall=self.pulse.worst_since(sent)))
        self.answered(record)


class FreshImages(ChatUser):
    """Cache-hostile: every picture is new."""

    weight = 4

    def messages(self) -> list[Message]:
        return [message(question(self.random), [self.new_picture()])]


class RepeatedImages(ChatUser):
    """Cache-friendly: new questions about eight pictures that all these users share."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        shared = Random(environment.parsed_options.seed)
        self.seeds = [shared.getrandbits(32) for _ in range(8)]

    def messages(self) -> list[Message]:
        return [message(question(self.random), [picture(self.random.choice(self.seeds), self.size)])]


class PolicyMix(ChatUser):
    """New pictures under one of several policies, whatever ``--pruning`` says."""

    def messages(self) -> list[Message]:
        self.pruning = self.random.choice(POLICIES)
        return [message(question(self.random), [self.new_picture()])]


class PromptLengths(ChatUser):
    """New pictures and questions of 8, 64 or 256 words."""

    def messages(self) -> list[Message]:
        text = question(self.random, self.random.choice(LENGTHS))
        return [message(text, [self.new_picture()])]


class ImageSizes(ChatUser):
    """New pictures from a thumbnail to a full screen."""

    def messages(self) -> list[Message]:
        size = self.random.choice(SIZES)
        return [message(question(self.random), [picture(self.random.getrandbits(32), size)])]


class Conversations(ChatUser):
    """Four questions about a picture, each after the whole conversation so far; then another picture."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.conversation = Conversation(self.random, size=self.size)

    def messages(self) -> list[Message]:
        return self.conversation.ask()

    def answered(self, record: Record) -> None:
        self.conversation.answered(None if record.error else record.text)
