"""A video, and models in plain transformers that read it beside images of which only some tokens are left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.support.unpruned import UnprunedReference


def video(frames: int = 4, width: int = 112, height: int = 140) -> tuple[np.ndarray, dict[str, Any]]:
    """A moving square, two frames a second, and what vLLM wants to know of it."""
    pictures = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        picture[20 * index : 20 * index + 40, 10:60] = (200, 60 * index % 256, 30)
    metadata = {
        "fps": 2.0,
        "duration": frames / 2.0,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return pictures, metadata


class VideoReference(UnprunedReference):
    """One for which an array (frames, height, width, 3) among the images is a video of two frames a second."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.processor = _Mixed(self.processor)

    def _alone(self, image: Any) -> dict[str, Tensor]:
        kind = "video" if isinstance(image, np.ndarray) else "image"
        prompt = self.processor.apply_chat_template([{"role": "user", "content": [{"type": kind}]}])
        return self._inputs(prompt, [image], [])


class _Mixed:
    """A processor of transformers that takes videos among the images."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Sequence[Any] | None, **options: Any) -> Any:
        stills = [each for each in images or () if not isinstance(each, np.ndarray)]
        videos = [each for each in images or () if isinstance(each, np.ndarray)]
        if videos:
            counts = [len(each) for each in videos]
            times = [{"fps": 2.0, "total_num_frames": n, "frames_indices": list(range(n))} for n in counts]
            options |= {"videos": videos, "video_metadata": times, "do_sample_frames": False}
        return self._processor(images=stills or None, **options)
