"""Serves unpruned requests to a Qwen-VL from one fresh engine and writes down every answer.

    python -m tests.engine.qwen_stock_answers CHECKPOINT OUTPUT

`test_qwen.py` runs it as a process without the plugin, and asks the same of an engine with it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.engines import Ask, Engine, running_engine
from tests.support.images import sample_images
from tests.support.qwen2_5_vl import IMAGE, VIDEO, ask_about

IMAGES = 8

QWEN_OPTIONS: dict[str, Any] = {
    "max_model_len": 4096,
    "limit_mm_per_prompt": {"image": 4, "video": 1},
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 64,
    "skip_mm_profiling": True,
    "worker_extension_cls": "tests.support.processes.ObservedWorker",
}
"""Of every engine that serves such a model in the tests."""


def video(frames: int = 4, width: int = 112, height: int = 140) -> tuple[np.ndarray, dict[str, Any]]:
    """A moving square, two frames a second, and what vLLM wants to know of it."""
    pictures = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        picture[20 * index : 20 * index + 40, 10:60] = (200, 60 * index, 30)
    metadata = {
        "fps": 2.0,
        "duration": frames / 2.0,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return pictures, metadata


def questions(pruning: object = None) -> list[Ask]:
    images = sample_images(IMAGES)
    return [
        *(Ask(ask_about(f"What is in picture {i}?"), [image], pruning) for i, image in enumerate(images)),
        Ask(ask_about("Compare the two.", IMAGE * 2), images[5:7], pruning),
        Ask(ask_about("What moves?", VIDEO), (), pruning, videos=[video()]),
        Ask(ask_about("What moves?", IMAGE + VIDEO), images[1:2], pruning, videos=[video()]),
        Ask(ask_about("Why?", ""), (), pruning),
    ]


def answers(engine: Engine, pruning: object = None) -> list[Any]:
    """To each question, from emptied caches and one by one, so that batches are the same in every run."""
    engine.forget_prompts()
    return [
        [
            answer.prompt_ids,
            answer.token_ids,
            [[list(entry) for entry in sorted(step.items())] for step in answer.logprobs],
        ]
        for answer in map(engine.ask, questions(pruning))
    ]


def main(checkpoint: str, output: str) -> None:
    with running_engine(Path(checkpoint), "qwen-stock", **QWEN_OPTIONS) as engine:
        record = {
            "processor": type(engine.processor).__name__,
            "worker": engine.llm.collective_rpc("worker_state")[0],
            "answers": answers(engine),
        }
    Path(output).write_text(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
