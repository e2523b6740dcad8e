"""Answers for ``/openapi.json``, from which FastAPI leaves out what is null."""

from __future__ import annotations

from typing import Any

IMAGE: dict[str, Any] = {
    "method": "resprune",
    "visual_tokens": 576,
    "kept_tokens": 64,
    "energy": None,
    "nouns": ["bus"],
    "text_fallback": None,
    "cached": False,
    "bypass_reason": None,
    "placement": "engine",
    "placement_reason": None,
    "kept": None,
}

REPORT: dict[str, Any] = {
    "method": "resprune",
    "preset": "fast",
    "budget": {"type": "ratio", "keep": 0.1111111111111111},
    "text_pipeline": "embedded",
    "untuned": False,
    "images": [IMAGE],
    "timings_ms": {"text": 0.6, "encode": None, "budget": None, "select": None, "ttft": 75.0, "total": 112.0},
}

CHAT_COMPLETION: dict[str, Any] = {
    "id": "chatcmpl-8a1f",
    "object": "chat.completion",
    "created": 1796083200,
    "model": "llava",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "The bus is red."}, "finish_reason": "stop"},
    ],
    "usage": {
        "prompt_tokens": 83,
        "completion_tokens": 6,
        "total_tokens": 89,
        "prompt_tokens_details": {"vtprune": {"visual_tokens": 576, "kept_tokens": 64}},
    },
    "pruning": REPORT,
}

PLAN: dict[str, Any] = {
    "object": "pruning.plan",
    "prompt_tokens": 83,
    "pruning": {
        **REPORT,
        "images": [
            {
                **IMAGE,
                "placement": "api",
                "placement_reason": "return_kept asks for positions, which the engine does not report",
                "kept": {"grid": [24, 24], "runs": [[0, 2], [31, 62]], "tiles": None, "view": [0.0, 0.0, 1.0, 1.0]},
            }
        ],
        "timings_ms": {"text": 0.6, "encode": 13.5, "budget": 0.1, "select": 3.8, "ttft": None, "total": 31.0},
    },
}
