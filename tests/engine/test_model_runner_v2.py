"""What Model Runner V2, vLLM's default on GPUs, asks of our model class: it does not run on a CPU, its parts do.

Its positions come from Triton kernels, which run in Triton's interpreter; its batching of images is plain Python.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

from tests.engine.conftest import ROOT
from tests.engine.qwen_stock_answers import video
from tests.support.qwen2_5_vl_requests import requests_to


def test_positions_are_those_by_hand(qwen_checkpoint: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_positions", str(qwen_checkpoint)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "positions agree" in done.stdout


@torch.inference_mode()
def test_images_of_all_kinds_are_encoded_in_one_batch(qwen_checkpoint: Path) -> None:
    reference, model, requests = requests_to(qwen_checkpoint, video())
    cache = EncoderCache()
    runner = EncoderRunner(
        model,
        max_num_tokens=4096,
        hidden_size=reference.model.config.text_config.hidden_size,
        encoder_cache=cache,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    ids = [f"request-{index}" for index in range(len(requests))]
    for request_id, request in zip(ids, requests, strict=True):
        cache.add_request(request_id, request.features)
    scheduled = {
        request_id: list(range(len(request.features))) for request_id, request in zip(ids, requests, strict=True)
    }
    hashes, items = runner.prepare_mm_inputs(scheduled)
    calls = []
    embed = model.embed_multimodal
    model.embed_multimodal = lambda **batch: calls.append(batch) or embed(**batch)
    cache.encoder_outputs.update(zip(hashes, runner.execute_mm_encoder(items), strict=True))
    sizes = [len(batch["num_kept"]) for batch in calls if "num_kept" in batch]
    assert max(sizes) >= 5, "images that are pruned and images that are not share a batch"

    computed = np.array([0, 30, 0, 0, 10])  # the beginning of a chunk may lie inside an image
    lengths = np.array([len(request.prompt_ids) for request in requests])
    scheduled_tokens = lengths - computed - np.array([0, 0, 40, 0, 0])
    starts = np.concatenate([[0], scheduled_tokens.cumsum()])
    embeds, is_media = runner.gather_mm_embeddings(
        ids, int(starts[-1]), scheduled_tokens, starts, prefill_lens=lengths, num_computed_tokens=computed
    )
    expected = []
    for request, begin, taken in zip(requests, computed, scheduled_tokens, strict=True):
        whole = torch.cat([medium.embeds[medium.kept] for medium in request.media])
        places = torch.cat(
            [
                torch.arange(feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length)
                for feature in request.features
            ]
        )
        expected.append(whole[(places >= begin) & (places < begin + taken)])
    torch.testing.assert_close(torch.cat(embeds), torch.cat(expected), rtol=0, atol=1e-4)
    assert int(is_media.sum()) == sum(map(len, expected))
