"""The same answers as a server, many times faster and without one.

Pictures are encoded and planned by the model's processor, as in the server, and answered in float32 by plain torch, in
batches. A policy without text is planned once per picture, and its kept tokens are prefilled once for all questions
(`forward.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from tokenizers.decoders import DecodeStream

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.plugin.inspection import InspectionFailed, features_of, pruning_processor
from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.policy import EnergyBudget, PruningPolicy, TokensBudget
from vllm_vtprune.sequence import sequence
from vllm_vtprune.text import read_prompt
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.asking import ANSWER_TOKENS
from vllm_vtprune_evaluation.forward import Asked, answer_greedily
from vllm_vtprune_evaluation.in_llm.driver import InLLM, check_kind
from vllm_vtprune_evaluation.merged import load_merged, merged_features
from vllm_vtprune_evaluation.progress import Progress, quiet
from vllm_vtprune_evaluation.questions import Picture, is_right

SERVED_AS = "offline float32"
CONTEXT = multiprocessing.get_context("spawn")  # how worker processes start
STOP_SECONDS = 5.0  # that a worker gets to end, before it is killed
BATCH_TOKENS = 1024  # tokens of pictures and questions per batch; larger batches do not fit the CPU's cache

Pending: TypeAlias = Sequence[tuple[int, Sequence[int]]]
"""Unanswered questions of a picture: (index of the arm, indices of the questions)."""

ArmAnswers: TypeAlias = list[tuple[int, Answer]]
"""(index of the arm, answer)."""


class OfflineFailed(Exception):
    """The model cannot be evaluated offline, or a worker process ended; the message gives the reason."""


def check_model(model: str) -> None:
    """Check that a model is a LLaVA-1.5.

    Raises:
        OfflineFailed: it is not, or cannot be read.
    """
    try:
        check_kind(Path(model))
    except (OSError, ValueError) as error:
        raise OfflineFailed(f"--offline: {model}: {error}") from error


def answer_offline(
    model: str, pictures: Sequence[Picture], arms: Sequence[Arm], answers: Answers, merged: Path | None = None
) -> None:
    """Answer every question of every picture under every arm, except those in ``answers``.

    Args:
        model: a LLaVA-1.5: a directory, or a name on the hub.
        pictures: the pictures.
        arms: the arms.
        answers: gets the answers.
        merged: folder of a merger and its language model.

    Raises:
        OfflineFailed: a worker cannot load or prune the model, or ended.
    """
    total = len(arms) * sum(len(picture.questions) for picture in pictures)
    with Workers(model, merged) as workers, Progress(desc="answered", total=total, unit="questions") as progress:
        workers.answer(pictures, arms, answers, progress.update)


class Workers:
    """Processes that answer questions, one per core, each with its own copy of the model.

    They start with the first question.

    Args:
        model, merged: see `answer_offline`.
    """

    def __init__(self, model: str, merged: Path | None = None) -> None:
        self._model = model
        self._merged = merged
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._processes:
            connection.close()  # a worker ends when it next reads or writes
        for process in self._processes.values():
            process.join(timeout=STOP_SECONDS)
            process.kill()

    def answer(
        self, pictures: Sequence[Picture], arms: Sequence[Arm], answers: Answers, progress: Callable[[int], object]
    ) -> None:
        """Answer every question of every picture under every arm, except those in ``answers``, which gets them.

        ``progress`` is called with numbers of questions that are answered.

        Raises:
            OfflineFailed: a worker cannot load or prune the model, or ended.
        """
        tasks = [(picture, arms, pending) for picture in pictures if (pending := _pending(picture, arms, answers))]
        unanswered = sum(len(questions) for _, _, pending in tasks for _, questions in pending)
        progress(len(arms) * sum(len(picture.questions) for picture in pictures) - unanswered)
        while len(self._processes) < min(os.cpu_count() or 1, len(tasks)):
            self._start()
        queue = iter(tasks)
        busy = []
        for connection, task in zip(self._processes, queue, strict=False):
            self._send(connection, task)
            busy.append(connection)
        while busy:
            for ready in wait(busy):
                connection = next(other for other in busy if other is ready)
                message = self._received(connection)
                if message is not None:
                    for arm, answer in message:
                        answers.add(arms[arm], answer)
                    progress(len(message))
                elif (next_task := next(queue, None)) is not None:
                    self._send(connection, next_task)
                else:
                    busy.remove(connection)

    def _start(self) -> None:
        parent_end, worker_end = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_work, args=(worker_end, self._model, self._merged), daemon=True)
        process.start()
        self._processes[parent_end] = process
        worker_end.close()  # so that the connection ends with the process

    def _send(self, connection: Connection, task: object) -> None:
        with suppress(BrokenPipeError):  # the worker has ended, as `_received` says
            connection.send(task)

    def _received(self, connection: Connection) -> ArmAnswers | None:
        """A batch of answers, or None at the end of a task."""
        try:
            message: ArmAnswers | str | ModuleNotFoundError | None = connection.recv()
        except EOFError:
            process = self._processes[connection]
            process.join()
            raise OfflineFailed(f"a process that answers ended with status {process.exitcode}") from None
        if isinstance(message, str):
            raise OfflineFailed(message)
        if isinstance(message, ModuleNotFoundError):
            raise message
        return message


def _pending(picture: Picture, arms: Sequence[Arm], answers: Answers) -> Pending:
    pending = []
    for number, arm in enumerate(arms):
        questions = [i for i in range(len(picture.questions)) if not answers.has(arm, picture.name(i))]
        if questions:
            pending.append((number, questions))
    return pending


def _work(connection: Connection, model: str, merged: Path | None) -> None:
    """Answer tasks. Sends answers, None at the end of a task, a string or a ModuleNotFoundError for an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["VTPRUNE_ENCODER_THREADS"] = "1"  # one core per worker
    quiet()
    torch.set_num_threads(1)
    try:
        offline = Offline(model, merged)
        while True:
            picture, arms, pending = connection.recv()
            for batch in offline.answers(picture, arms, pending):
                connection.send(batch)
            connection.send(None)
    except (EOFError, BrokenPipeError):  # the parent has ended
        return
    except (InspectionFailed, OSError, ValueError) as error:  # a PolicyError is a ValueError
        connection.send(f"--offline: {error}")
    except ModuleNotFoundError as error:  # of a package that the pictures come from
        connection.send(error)


@dataclass(eq=False)
class _Kept:
    """Kept visual tokens, and the questions and arms that share them."""

    embeds: torch.Tensor
    arms_by_question: dict[int, list[int]] = field(default_factory=dict)  # indices


class Offline:
    """A LLaVA-1.5 checkpoint without a server.

    Args:
        model: a directory, or a name on the hub.
        merged: see `answer_offline`.

    Raises:
        InspectionFailed: the model cannot be read or pruned.
        OSError, ValueError: from `InLLM` and `load_merged`.
    """

    def __init__(self, model: str, merged: Path | None = None) -> None:
        self._language = InLLM(Path(model), add_special_tokens=False)  # as vLLM's chat endpoint begins a prompt
        self._processor = pruning_processor(model, "float32")
        self._tokenizer = self._language.processor.tokenizer
        self._merger = None if merged is None else load_merged(merged, self._language.model)

    def answers(self, picture: Picture, arms: Sequence[Arm], pending: Pending) -> Iterator[ArmAnswers]:
        """Answer the pending questions of a picture, in batches.

        Raises:
            PolicyError: the model lacks what a policy needs.
            ValueError: a question holds the image token.
        """
        features = features_of(self._processor, picture.paint())
        if self._merger is not None:
            features = merged_features(features, self._merger)
        prompts = [self._language.token_ids(question.text) for question in picture.questions]
        batch: list[_Kept] = []
        tokens = 0
        for kept in self._kept(picture, features, arms, pending):
            batch.append(kept)
            tokens += len(kept.embeds) + sum(len(prompts[question][0]) for question in kept.arms_by_question)
            if tokens >= BATCH_TOKENS:
                yield self._answered(picture, batch, prompts)
                batch, tokens = [], 0
        if batch:
            yield self._answered(picture, batch, prompts)

    def _kept(
        self, picture: Picture, features: VisualFeatures, arms: Sequence[Arm], pending: Pending
    ) -> Iterator[_Kept]:
        """The kept tokens of every arm and question, once for equal policies and nouns."""
        groups: dict[tuple[str, tuple[int, ...]], tuple[PruningPolicy, dict[int, list[int]]]] = {}
        counts: dict[object, int] = {}
        for number, questions in pending:
            policy = PruningPolicy.parse(arms[number].policy_for(picture.label)).resolve(self._processor.family)
            policy = _counted(policy, features, counts)
            digest = policy.selection_digest()
            for question in questions:
                nouns = self._nouns(policy, picture.questions[question].text) if policy.conditions_on_text else ()
                _, arms_by_question = groups.setdefault((digest, nouns), (policy, {}))
                arms_by_question.setdefault(question, []).append(number)
        for (_, nouns), (policy, arms_by_question) in groups.items():
            yield _Kept(sequence(features, self._plan(features, policy, nouns)), arms_by_question)

    def _plan(self, features: VisualFeatures, policy: PruningPolicy, nouns: tuple[int, ...]) -> PruningPlan:
        if self._merger is None:
            return self._processor.runtime.local.plan(features, policy, nouns)
        rows = self._language.model.get_input_embeddings().weight.detach()  # the merger's, not the checkpoint's
        return plan_tokens(features, policy, rows[list(nouns)] if nouns else None, family=self._processor.family)

    def _nouns(self, policy: PruningPolicy, question: str) -> tuple[int, ...]:
        """Token ids of a question's nouns, as on the server."""
        text = question if policy.text.query is None else policy.text.query
        nouns = read_prompt(text, policy.text.clean, policy.text.modifiers).nouns
        return tuple(token for noun in nouns for token in noun_ids(noun, self._tokenizer))

    def _answered(
        self, picture: Picture, batch: Sequence[_Kept], prompts: Sequence[tuple[list[int], int]]
    ) -> ArmAnswers:
        rows = []
        for kept in batch:
            row_prompts = [prompts[question] for question in kept.arms_by_question]
            ids, start = row_prompts[0]  # all prompts are equal up to the picture
            rows.append(Asked(ids[:start], kept.embeds, [ids[start + 1 :] for ids, start in row_prompts]))
        outputs = answer_greedily(self._language.model, rows, self._language.ends, ANSWER_TOKENS)
        answers = []
        for kept, row_outputs in zip(batch, outputs, strict=True):
            for (number, arms), ids in zip(kept.arms_by_question.items(), row_outputs, strict=True):
                question = picture.questions[number]
                text = self._decoded(prompts[number][0], ids)
                answer = Answer(
                    picture.name(number),
                    question.kind,
                    picture.density,
                    text,
                    is_right(text, question.answer),
                    len(kept.embeds),
                )
                answers += [(arm, answer) for arm in arms]
        return answers

    def _decoded(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Decode an answer as vLLM streams it: with the prompt as context, without a truncated character at the end."""
        tokenizer = self._tokenizer.backend_tokenizer
        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        text = ""
        for token in ids:
            try:
                text += stream.step(tokenizer, token) or ""
            except Exception:  # invalid bytes: start over, like vLLM
                stream = DecodeStream(skip_special_tokens=True)
                text += stream.step(tokenizer, token) or ""
        return text


def _counted(policy: PruningPolicy, features: VisualFeatures, counts: dict[object, int]) -> PruningPolicy:
    """Replace an energy budget by its token count, which is equal for all methods and so computed once per picture.

    Args:
        policy: a resolved policy.
        features: features of the picture.
        counts: cache of counts for this picture.
    """
    if not policy.enabled or not isinstance(policy.budget, EnergyBudget):
        return policy
    method = policy.chosen
    most = method.max_keep(features)
    key = (policy.budget, method.seed, most)
    if key not in counts:
        counts[key] = token_budget(policy.budget, features, seed=method.seed, most=most)[0]
    return policy.with_budget(TokensBudget(keep=counts[key]))
