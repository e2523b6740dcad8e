"""Ask a server about pictures, arm by arm in turns.

At one client, the arms alternate with every request. With more clients, an arm has the server to itself for as many
requests as keep all its clients busy twice; then comes the next arm. The first arm rotates. In a round, all arms ask
the same questions about the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from vllm_vtprune_evaluation.bench.subjects import Subject
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import span
from vllm_vtprune_evaluation.messages import message

FEWEST = 4  # rounds; fewer say too little of the spread

OFF = "off"
STOCK = "stock"

REPEATED = "repeated"  # the copy of a picture that every arm is asked about, so that it is in the server's caches
CACHED = 8  # pictures that are asked about again; all caches hold that many


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        name: in tables.
        pruning: policy or preset of its requests; None: the field is not sent, as stock vLLM does not know it.
    """

    name: str
    pruning: object = None

    @property
    def prunes(self) -> bool:
        """Whether it is to drop tokens."""
        return self.pruning not in (None, False, OFF)


@dataclass(frozen=True)
class Level:
    """How arms are loaded.

    Attributes:
        clients: concurrent clients, each of which asks again once it is answered.
        new: whether every request has a picture that the server has not seen; else all are in its caches.
    """

    clients: int
    new: bool = True

    def __str__(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}{'' if self.new else ', repeated'}"

    @property
    def block(self) -> int:
        """Requests of an arm in a round."""
        return 1 if self.clients == 1 else 2 * self.clients

    def rounds(self, requests: int) -> int:
        """Rounds for at least so many requests of each arm."""
        return max(FEWEST, -(-requests // self.block))


@dataclass
class Measured:
    """All requests of a benchmark.

    Attributes:
        answers: by arm, one request for each subject, to its own end.
        again: the same of the arm `OFF`, once more.
        rounds: by level and arm, round by round, answers of a fixed length.
    """

    answers: dict[str, list[Record]] = field(default_factory=dict)
    again: list[Record] = field(default_factory=list)
    rounds: dict[Level, dict[str, list[list[Record]]]] = field(default_factory=dict)

    def records(self) -> Iterator[Record]:
        """All of them."""
        arms = chain.from_iterable(by_arm.values() for by_arm in self.rounds.values())
        return chain(*self.answers.values(), self.again, *chain.from_iterable(arms))


@dataclass(frozen=True)
class Asker:
    """Sends requests to a server.

    Attributes:
        send: sends a request of this name and body, and returns its record.
        model: served name of the model.
        max_tokens: tokens of an answer.
        progress: called after each request.
        run: differs from run to run, as the server may outlive them.
    """

    send: Callable[[str, Mapping[str, Any]], Record]
    model: str
    max_tokens: int
    progress: Callable[[], object]
    run: str

    def ask(
        self, arm: Arm, name: str, requests: Sequence[tuple[Subject, str]], clients: int, **body: Any
    ) -> list[Record]:
        """Ask about subjects, each in a copy of its own; returns the records in this order.

        Args:
            arm: the arm.
            name: kind of the requests.
            requests: subjects, each with the `copy` of `Subject.url`.
            clients: how many ask at the same time.
            body: more fields of the requests.
        """

        def send(request: tuple[Subject, str]) -> Record:
            subject, copy = request
            messages = [message(subject.question, [subject.url(copy)])]
            fields = {"model": self.model, "messages": messages, "temperature": 0}
            if arm.pruning is not None:
                fields["pruning"] = arm.pruning
            record = self.send(name, {**fields, "max_tokens": self.max_tokens, **body})
            self.progress()
            return record

        executor = ThreadPoolExecutor(clients)
        try:
            return list(executor.map(send, requests))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, nothing more is sent

    def answers(self, arm: Arm, subjects: Sequence[Subject], clients: int, copy: str = REPEATED) -> list[Record]:
        """One answer to each question, to its own end."""
        return self.ask(arm, f"{arm.name}, answers", [(subject, copy) for subject in subjects], clients)

    def block(self, arm: Arm, level: Level, number: int, subjects: Sequence[Subject]) -> list[Record]:
        """The requests of an arm in a round."""
        if not level.new:
            subjects = subjects[:CACHED]
        requests = []
        for index in range(level.block):
            subject = subjects[(number * level.block + index) % len(subjects)]
            requests.append((subject, f"{self.run} {level} {number} {index} {arm.name}" if level.new else REPEATED))
        return self.ask(arm, f"{arm.name}, {level}", requests, level.clients, ignore_eos=True)


def turn(arms: Sequence[Arm], number: int) -> list[Arm]:
    """The arms in the order in which a round measures them."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def throughput(block: Sequence[Record]) -> float:
    """Requests per second of an arm in a round."""
    seconds = span(block)
    return len(block) / seconds if seconds else 0.0
