"""Serves unpruned requests from one fresh engine and writes down every answer: `test_stock.py` runs it as a process.

    python -m tests.engine.stock_answers CHECKPOINT OUTPUT VARIANT...

A variant is the value of the pruning key in JSON, or "absent". Each is asked the same, in the order given, from emptied
caches. Requests go one by one, so that batches are the same in every run.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.engines import Ask, Engine, ask_about, running_engine
from tests.support.images import sample_images
from tests.support.processes import state

IMAGES = 20
TEXTS = ("What is the capital of the sea?", "Count from one to ten.", "Why?")


def questions(pruning: object) -> list[Ask]:
    images = sample_images(IMAGES)
    single = [Ask(ask_about(f"What is in picture {i}?"), [image], pruning) for i, image in enumerate(images)]
    pairs = [Ask(ask_about("Compare the two.", images=2), images[i : i + 2], pruning) for i in (0, 6)]
    return single + pairs + [Ask(ask_about(text), (), pruning) for text in TEXTS]


def answers(engine: Engine, pruning: object) -> list[Any]:
    engine.forget_prompts()
    return [
        [answer.prompt_ids, answer.token_ids, [sorted(step.items()) for step in answer.logprobs]]
        for answer in map(engine.ask, questions(pruning))
    ]


def main(checkpoint: str, output: str, *variants: str) -> None:
    with running_engine(
        Path(checkpoint), "stock", worker_extension_cls="tests.support.processes.ObservedWorker"
    ) as engine:
        record: dict[str, Any] = {"processor": type(engine.processor).__name__, "started": state(), "answers": {}}
        for variant in variants:
            record["answers"][variant] = answers(engine, None if variant == "absent" else json.loads(variant))
        record["served"] = state()
        record["worker"] = engine.llm.collective_rpc("worker_state")[0]
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
