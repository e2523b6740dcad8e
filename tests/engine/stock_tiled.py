"""Asks an engine without the plugin about images of many shapes; `test_tiled.py` runs it as a process.

python -m tests.engine.stock_tiled FAMILY CHECKPOINT OUTPUT
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.engine.qwen_stock_answers import video
from tests.support.engines import Ask, Engine, running_engine
from tests.support.tiled import ASPECTS, FAMILIES, Family, picture, pictures


def questions(family: Family, pruning: object) -> list[Ask]:
    single = [
        Ask(family.ask_about(f"What is in picture {i}?"), [picture(i, aspect)], pruning)
        for i, aspect in enumerate((*ASPECTS, (300, 1), (1, 300)))
    ]
    several = [
        Ask(family.ask_about("Compare them.", images=len(shapes)), pictures(range(len(shapes)), shapes), pruning)
        for shapes in (ASPECTS[:2], ASPECTS[2:6])
    ]
    moving = [
        Ask(family.ask_about(f"{family.video}\nWhat moves?", images=images), pictures([2] * images, ASPECTS[:images]))
        for images in (0, 1)
    ]
    videos = [replace(asked, pruning=pruning, videos=[video()]) for asked in moving] if family.video else []
    return [*single, *several, *videos, Ask(family.ask_about("Count from one to ten.", images=0), (), pruning)]


def answers(engine: Engine, family: Family, pruning: object) -> list[Any]:
    """Prompt, answer and log-probabilities, one by one from emptied caches, so that batches are the same every time."""
    engine.forget_prompts()
    return [
        [answer.prompt_ids, answer.token_ids, [sorted(step.items()) for step in answer.logprobs]]
        for answer in map(engine.ask, questions(family, pruning))
    ]


def main(name: str, checkpoint: str, output: str) -> None:
    family = FAMILIES[name]
    with running_engine(Path(checkpoint), name, **family.engine_options) as engine:
        record = {
            "processor": type(engine.processor).__name__,
            "answers": answers(engine, family, None),
            "worker": engine.llm.collective_rpc("worker_state")[0],
        }
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
