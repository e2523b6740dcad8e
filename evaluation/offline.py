"""The answers of a server, many times faster, without one: each picture is encoded, and answered in batches, once.

Pictures are encoded and planned by the model's own processor, as in the server, and answered in float32 by plain torch.
A way of pruning that does not look at the question is planned once for all questions about a picture, and its kept
tokens are read once for all of them (`forward.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

from vllm_vtprune.budget import token_budget
from vllm_vtprune.features import VisualFeatures
from vllm_vtprune.plan import PruningPlan, plan_tokens
from vllm_vtprune.plugin.prompt import noun_ids
from vllm_vtprune.policy import EnergyBudget, PruningPolicy, TokensBudget
from vllm_vtprune.sequence import sequence
from vllm_vtprune.text import read_prompt
from vllm_vtprune_evaluation.answers import Answer, Answers
from vllm_vtprune_evaluation.arms import Arm
from vllm_vtprune_evaluation.asking import ANSWER_TOKENS
from vllm_vtprune_evaluation.forward import Asked, answer_greedily
from vllm_vtprune_evaluation.in_llm.driver import InLLM, check_kind
from vllm_vtprune_evaluation.inspection import InspectionFailed, features_of, pruning_processor
from vllm_vtprune_evaluation.merged import load_merged, merged_features
from vllm_vtprune_evaluation.questions import Picture, is_right

SERVED_AS = "offline float32"
CONTEXT = multiprocessing.get_context("spawn")  # of its processes
BATCH_TOKENS = 1024  # of pictures and questions that are computed together: more leave the processor's cache

Pending: TypeAlias = Sequence[tuple[int, Sequence[int]]]
"""What is to be asked about a picture: an arm's number, and its questions'."""

Given: TypeAlias = list[tuple[int, Answer]]
"""Answers, each with its arm's number."""


class OfflineFailed(Exception):
    """The model cannot be asked offline, or what asks it has ended; the message says why."""


def check_model(model: str) -> None:
    """Refuse a model that is not of LLaVA-1.5's kind.

    Raises:
        OfflineFailed: it is another, or none.
    """
    try:
        check_kind(Path(model))
    except (OSError, ValueError) as error:
        raise OfflineFailed(f"--offline: {model}: {error}") from error


def answer_offline(
    model: str, pictures: Sequence[Picture], arms: Sequence[Arm], answers: Answers, merged: Path | None = None
) -> None:
    """Ask every question of every picture in every way, but for those that ``answers`` already holds.

    One process for each core answers picture after picture, each with its own copy of the model.

    Args:
        model: a directory, or a name on the hub, of LLaVA-1.5's kind.
        merged: a folder with a merger for it, and the language model that goes with that.

    Raises:
        OfflineFailed: a process cannot load the model or prune with it, or has ended.
    """
    tasks = [(picture, pending) for picture in pictures if (pending := _pending(picture, arms, answers))]
    total = len(arms) * sum(len(picture.questions) for picture in pictures)
    left = sum(len(questions) for _, pending in tasks for _, questions in pending)
    workers: dict[Connection, Any] = {}
    queue = iter(tasks)
    try:
        for _ in range(min(os.cpu_count() or 1, len(tasks))):
            ours, theirs = CONTEXT.Pipe()
            workers[ours] = CONTEXT.Process(target=_work, args=(theirs, model, arms, merged), daemon=True)
            workers[ours].start()
            theirs.close()  # so that the end of the process is the end of the connection
        with tqdm(total=total, initial=total - left, unit="question", disable=None) as progress:
            while workers:
                for connection in wait(list(workers)):
                    assert isinstance(connection, Connection)
                    process = workers[connection]
                    try:
                        given = connection.recv()
                    except EOFError:
                        process.join()
                        raise OfflineFailed(f"a process that answers ended with status {process.exitcode}") from None
                    if isinstance(given, str):
                        raise OfflineFailed(given)
                    for number, answer in given or ():
                        answers.add(arms[number], answer)
                    progress.update(len(given or ()))
                    if given is None:
                        task = next(queue, None)
                        connection.send(task)
                        if task is None:
                            workers.pop(connection).join()
    finally:
        for process in workers.values():
            process.kill()  # it holds nothing that is not here yet


def _pending(picture: Picture, arms: Sequence[Arm], answers: Answers) -> Pending:
    pending = []
    for number, arm in enumerate(arms):
        questions = [i for i in range(len(picture.questions)) if not answers.has(arm, picture.name(i))]
        if questions:
            pending.append((number, questions))
    return pending


def _work(connection: Connection, model: str, arms: Sequence[Arm], merged: Path | None) -> None:
    """Answer about the pictures that come, until None does; a string that is sent back says what failed.

    None is sent back where there is nothing left to do.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ["VTPRUNE_TOWER_THREADS"] = "1"  # the others have the other cores
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)
    try:
        offline = Offline(model, merged)
        connection.send(None)
        while (task := connection.recv()) is not None:
            picture, pending = task
            for given in offline.answers(picture, arms, pending):
                connection.send(given)
            connection.send(None)
    except (EOFError, BrokenPipeError):  # nobody waits for more
        return
    except (InspectionFailed, OSError, ValueError) as error:  # a PolicyError is a ValueError
        connection.send(f"--offline: {error}")


@dataclass(eq=False)
class _Kept:
    """Visual tokens that were kept, and who asks about them."""

    embeds: torch.Tensor
    askers: dict[int, list[int]] = field(default_factory=dict)  # by question: numbers of arms


class Offline:
    """A LLaVA-1.5 checkpoint that is asked without a server.

    Args:
        model: a directory, or a name on the hub.
        merged: as of `answer_offline`.

    Raises:
        InspectionFailed: it cannot be read, or cannot be pruned.
        OSError, ValueError: as `InLLM` and `load_merged` raise them.
    """

    def __init__(self, model: str, merged: Path | None = None) -> None:
        self._language = InLLM(Path(model), add_special_tokens=False)  # as vLLM's chat endpoint begins a prompt
        self._processor = pruning_processor(model, "float32")
        self._tokenizer = self._language.processor.tokenizer
        self._merger = None if merged is None else load_merged(merged, self._language.model)

    def answers(self, picture: Picture, arms: Sequence[Arm], pending: Pending) -> Iterator[Given]:
        """Ask about a picture, in batches.

        Raises:
            PolicyError: the model lacks what a policy asks for.
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
            tokens += len(kept.embeds) + sum(len(prompts[question][0]) for question in kept.askers)
            if tokens >= BATCH_TOKENS:
                yield self._answered(picture, batch, prompts)
                batch, tokens = [], 0
        if batch:
            yield self._answered(picture, batch, prompts)

    def _kept(
        self, picture: Picture, features: VisualFeatures, arms: Sequence[Arm], pending: Pending
    ) -> Iterator[_Kept]:
        """What every arm keeps, once for all that keep it for the same reason."""
        reasons: dict[tuple[str, tuple[int, ...]], tuple[PruningPolicy, dict[int, list[int]]]] = {}
        counts: dict[object, int] = {}
        for number, questions in pending:
            policy = PruningPolicy.parse(arms[number].policy_for(picture.label)).resolve(self._processor.family)
            policy = _counted(policy, features, counts)
            digest = policy.selection_digest()
            for question in questions:
                nouns = self._nouns(policy, picture.questions[question].text) if policy.conditions_on_text else ()
                _, askers = reasons.setdefault((digest, nouns), (policy, {}))
                askers.setdefault(question, []).append(number)
        for (_, nouns), (policy, askers) in reasons.items():
            yield _Kept(sequence(features, self._plan(features, policy, nouns)), askers)

    def _plan(self, features: VisualFeatures, policy: PruningPolicy, nouns: tuple[int, ...]) -> PruningPlan:
        if self._merger is None:
            return self._processor.runtime.plan(features, policy, nouns)
        rows = self._language.model.get_input_embeddings().weight.detach()  # not those of the checkpoint
        return plan_tokens(features, policy, rows[list(nouns)] if nouns else None, family=self._processor.family)

    def _nouns(self, policy: PruningPolicy, question: str) -> tuple[int, ...]:
        """Token ids of the nouns that the server would read in a message with the picture and the question."""
        text = question if policy.text.query is None else policy.text.query
        nouns = read_prompt(text, policy.text.clean, policy.text.modifiers).nouns
        return tuple(token for noun in nouns for token in noun_ids(noun, self._tokenizer))

    def _answered(self, picture: Picture, batch: Sequence[_Kept], prompts: Sequence[tuple[list[int], int]]) -> Given:
        asked = []
        for kept in batch:
            whole = [prompts[question] for question in kept.askers]
            ids, start = whole[0]  # all begin alike: the picture stands before the question
            asked.append(Asked(ids[:start], kept.embeds, [ids[start + 1 :] for ids, start in whole]))
        said = answer_greedily(self._language.model, asked, self._language.ends, ANSWER_TOKENS)
        given = []
        for kept, texts in zip(batch, said, strict=True):
            for (number, numbers), ids in zip(kept.askers.items(), texts, strict=True):
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
                given += [(arm, answer) for arm in numbers]
        return given

    def _decoded(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of an answer as vLLM streams it: it goes on from the prompt, and a character cut off is left out."""
        tokenizer = self._tokenizer.backend_tokenizer
        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        text = ""
        for token in ids:
            try:
                text += stream.step(tokenizer, token) or ""
            except Exception:  # bytes that are no text: vLLM begins anew there, too
                stream = DecodeStream(skip_special_tokens=True)
                text += stream.step(tokenizer, token) or ""
        return text


def _counted(policy: PruningPolicy, features: VisualFeatures, counts: dict[object, int]) -> PruningPolicy:
    """The policy with the number of tokens in the place of an energy budget, whose spectrum is the same for methods.

    Args:
        counts: of budgets that were looked at before, for the same picture.
    """
    if not policy.enabled or not isinstance(policy.budget, EnergyBudget):
        return policy
    method = policy.chosen
    most = method.max_keep(features)
    key = (policy.budget, method.seed, most)
    if key not in counts:
        counts[key] = token_budget(policy.budget, features, seed=method.seed, most=most)[0]
    return policy.with_budget(TokensBudget(keep=counts[key]))
