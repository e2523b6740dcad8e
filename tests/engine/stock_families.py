"""What one fresh engine answers to unpruned requests.

`test_families.py` and `test_stock.py` call `serve` where vLLM is stock, and ask engines with the plugin the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.support.engines import Ask, Engine, running_engine, variables
from tests.support.families import FAMILIES, Chat, Family, Turn
from tests.support.forked import context, prepare
from tests.support.processes import state

WITHOUT_PLUGIN = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The environment of a stock engine. It starts no other process, which would have to import vLLM anew."""


@contextmanager
def fresh_process(environment: Mapping[str, str]) -> Iterator[Executor]:
    """A process with these variables, some of which vLLM reads as it is imported; it has loaded no plugins of vLLM."""
    imported_anew = "TRITON_INTERPRET" in environment
    method = get_context("spawn") if imported_anew else context()
    with ProcessPoolExecutor(1, method, prepare, ({**os.environ, **environment},)) as process:
        with variables(environment):
            process.submit(os.getpid).result()  # by which it starts
        yield process


def questions(family: Family, chat: Chat, pruning: object) -> list[Ask]:
    """Each picture alone, all of them together, the same with a second turn, and no picture."""
    pictures = family.pictures("stock")
    alone = [Ask(chat.prompt([Turn("What is it?", 1)]), [picture], pruning) for picture in pictures]
    turns = [Turn("Compare them.", 3), Turn("Where is the cat?")]
    together = [Ask(chat.prompt(turns[:count]), pictures, pruning) for count in (1, 2)]
    return [*alone, *together, Ask(chat.prompt([Turn("Count from one to ten.")]), (), pruning)]


def answers(engine: Engine, family: Family, chat: Chat, pruning: object = None) -> list[Any]:
    """Prompt, answer and log-probabilities, one by one from emptied caches, so that batches are the same every time."""
    engine.forget_prompts()
    asked = map(engine.ask, questions(family, chat, pruning))
    results = [[each.prompt_ids, each.token_ids, [sorted(step.items()) for step in each.logprobs]] for each in asked]
    return json.loads(json.dumps(results))  # type: ignore[no-any-return]


def serve(name: str, checkpoint: Path, prunings: Sequence[object] = (None,)) -> dict[str, Any]:
    """Start the engine of a family and ask it, once for each value of the pruning key, of which None leaves it out.

    Returns:
        "answers" to each of `prunings`, and the `state` of this process when it "started" and when it had "served", and
        of its "worker".
    """
    family, chat = FAMILIES[name], Chat(checkpoint)
    with running_engine(checkpoint, f"{name}-stock", **family.engine_options) as engine:
        return {
            "started": state(),
            "answers": [answers(engine, family, chat, pruning) for pruning in prunings],
            "served": state(),
            "worker": engine.llm.collective_rpc("worker_state")[0],
        }
