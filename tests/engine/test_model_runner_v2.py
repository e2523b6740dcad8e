"""What Model Runner V2, vLLM's default on GPUs, asks of our model classes, part by part; `test_v2.py` runs it whole.

Its positions come from Triton kernels, which run in Triton's interpreter; its batching of media is plain Python. The
models are vLLM's own, with their own vision encoders for what is not pruned; transformers says what should come out.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

from tests.support.engines import ROOT
from tests.support.images import sample_images
from tests.support.qwen2_5_vl import IMAGE, VIDEO, QwenReference
from tests.support.reference import InternVLReference, LlavaNextReference, Reference
from tests.support.served import Served, served
from tests.support.videos import video
from vllm_vtprune import PruningPolicy, plan_tokens
from vllm_vtprune_checkpoints.internvl import write_internvl_checkpoint
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_checkpoints.llava_next import write_llava_next_checkpoint
from vllm_vtprune_checkpoints.qwen2_5_vl import write_qwen2_5_vl_checkpoint

pytestmark = pytest.mark.usefixtures("placement_api")

ANSWERED = 5
"""The first token of an answer."""

CLOSE = 1e-4
"""Of an embedding: the same computation in another order of additions."""


@dataclass(frozen=True)
class Family:
    """`image`, `video`: what stands for one in a prompt; no video where the family has none."""

    write: Callable[..., Path]
    reference: type[Reference]
    image: str
    video: str | None = None


FAMILIES = {
    "llava": Family(write_llava_checkpoint, Reference, "<image>"),
    "llava_next": Family(partial(write_llava_next_checkpoint, image_size=112), LlavaNextReference, "<image>"),
    "internvl": Family(
        partial(write_internvl_checkpoint, image_size=112), InternVLReference, "<IMG_CONTEXT>", "<video>"
    ),
    "qwen2_5_vl": Family(write_qwen2_5_vl_checkpoint, QwenReference, IMAGE, VIDEO),
}


@dataclass(frozen=True)
class Item:
    """An image or a video of a prompt: what the model gets of it, the places of its tokens, and what they should be."""

    feature: MultiModalFeatureSpec
    pruned: bool
    places: Tensor
    embeds: Tensor


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    items: list[Item]


class Requests:
    """Makes requests as they reach a runner, and says what it should make of them."""

    def __init__(self, family: Family, checkpoint: Path, served: Served) -> None:
        self.family, self.served = family, served
        self.reference: Any = family.reference(checkpoint)

    def of(self, *media: tuple[Any, Any]) -> Request:
        """A request with these media: an image with its policy (False: none), or None for the video."""
        images = [(image, policy) for image, policy in media if image is not None]
        names = [f"image {hash(image.tobytes())}" for image, _ in images]
        data: dict[str, Any] = {"image": [image for image, _ in images]}
        uuids: dict[str, Any] = {"image": names}
        if len(images) < len(media):
            data["video"], uuids["video"] = [video()], [None]
        processor = self.served.processor
        marks = [self.family.image if image is not None else self.family.video for image, _ in media]
        pruning = {"images": [policy for _, policy in images], "texts": ["Where is the bus?"] * len(images)}
        processed = processor(
            "Look at " + " and ".join(marks) + ": where is the bus?",
            processor.info.parse_mm_data(data),
            mm_uuid_items=uuids,
            hf_processor_mm_kwargs={"pruning": pruning},
        )
        items = []
        for modality, places in processed["mm_placeholders"].items():
            for index, place in enumerate(places):
                feature = MultiModalFeatureSpec(
                    processed["mm_kwargs"][modality][index],
                    modality,
                    processed["mm_hashes"][modality][index],
                    mm_position=place,
                )
                within = torch.arange(place.length) if place.is_embed is None else place.is_embed.nonzero()[:, 0]
                if modality == "video":
                    policy, embeds = False, self.reference.video_embeds(video()[0])
                else:
                    image, policy = images[index]
                    embeds = self._kept(image, policy, names[index])
                items.append(Item(feature, policy is not False, place.offset + within, embeds))
        items.sort(key=lambda item: item.feature.mm_position.offset)
        return Request(processed["prompt_token_ids"], items)

    def _kept(self, image: Any, policy: Any, name: str) -> Tensor:
        whole: Tensor = self.reference.visual_embeds(image)
        if policy is False:
            return whole
        processor = self.served.processor
        features = processor.runtime.local.cache.get(name)
        nouns = self.reference.noun_embeds(["bus"])
        plan = plan_tokens(features, PruningPolicy.parse(policy), nouns, family=processor.family)
        kept: Tensor = self.reference.kept_embeds(whole, plan.kept)
        return kept

    def embedded(self, ids: Tensor, items: list[Item]) -> Tensor:
        """(L, d): what the language model should read of a prompt."""
        table: Tensor = self.reference.model.get_input_embeddings()(ids).detach().clone()
        for item in items:
            table[item.places] = item.embeds
        return table


@pytest.fixture(scope="module", params=FAMILIES)
def requests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Requests]:
    family = FAMILIES[request.param]
    checkpoint = family.write(tmp_path_factory.mktemp(request.param), dtype="float32")
    with served(checkpoint) as served_model:
        yield Requests(family, checkpoint, served_model)


@torch.inference_mode()
def test_media_of_all_kinds_in_one_batch(requests: Requests) -> None:
    model, reference = requests.served.model, requests.reference
    few, many = ({"budget": {"type": "tokens", "keep": keep}} for keep in (24, 40))
    everything = {"budget": {"type": "ratio", "keep": 1.0}}
    tall, wide, square, other = (
        image.resize(size)
        for image, size in zip(sample_images(4), ((112, 448), (448, 112), (280, 280), (196, 252)), strict=True)
    )
    moving = [(None, None)] if requests.family.video else []
    asked = [
        requests.of((tall, few)),
        requests.of((wide, few), (square, False)),
        requests.of((square, False), *moving, (tall, many)),
        requests.of((other, False)),
        requests.of(*moving, (other, few), (wide, everything), (other, few)),
    ]
    cache = EncoderCache()
    width = reference.model.config.get_text_config().hidden_size
    runner = EncoderRunner(model, 4096, width, cache, torch.float32, torch.device("cpu"))
    ids = [f"request-{number}" for number in range(len(asked))]
    for request_id, request in zip(ids, asked, strict=True):
        cache.add_request(request_id, [item.feature for item in request.items])
    calls: list[set[int]] = []  # of each call of the model, the embeddings it returned

    def embed(**batch: Any) -> Any:
        embeddings = type(model).embed_multimodal(model, **batch)
        calls.append(set(map(id, embeddings)))
        return embeddings

    model.embed_multimodal = embed
    hashes, inputs = runner.prepare_mm_inputs(
        {request_id: list(range(len(request.items))) for request_id, request in zip(ids, asked, strict=True)}
    )
    outputs = runner.execute_mm_encoder(inputs)
    items = [item for request in asked for item in request.items]
    assert len(outputs) == len(items) == 9 + 2 * len(moving)
    for item, embeds in zip(items, outputs, strict=True):
        torch.testing.assert_close(embeds, item.embeds, rtol=0, atol=CLOSE)
    kinds = [{item.pruned for item, embeds in zip(items, outputs, strict=True) if id(embeds) in call} for call in calls]
    assert {True, False} not in kinds, "what is pruned and what is not come in one call"

    images = [index for index, (modality, _) in enumerate(inputs) if modality == "image"]
    for chosen in [*((index,) for index in images), *pairwise(images)]:  # those of equal counts come stacked
        again = runner.execute_mm_encoder([inputs[index] for index in chosen])
        for index, embeds in zip(chosen, again, strict=True):
            torch.testing.assert_close(embeds, items[index].embeds, rtol=0, atol=CLOSE)

    # Two steps: every prompt but the first is cut inside of an image, the first has an answer's token by then.
    cache.encoder_outputs.update(zip(hashes, outputs, strict=True))
    lengths = np.array([len(request.prompt_ids) for request in asked])
    cuts = np.array([lengths[0], *(int(request.items[-1].places[7]) for request in asked[1:])])
    prompts = [torch.tensor([*request.prompt_ids, ANSWERED]) for request in asked]
    whole = [requests.embedded(tokens, request.items) for tokens, request in zip(prompts, asked, strict=True)]
    for computed, ends in ((np.zeros_like(lengths), cuts), (cuts, np.array([lengths[0] + 1, *lengths[1:]]))):
        scheduled = ends - computed
        starts = np.concatenate([[0], scheduled.cumsum()])
        embeds, is_media = runner.gather_mm_embeddings(
            ids, int(starts[-1]), scheduled, starts, prefill_lens=lengths, num_computed_tokens=computed
        )
        tokens = torch.cat([rows[begin:end] for rows, begin, end in zip(prompts, computed, ends, strict=True)])
        read = runner.get_inputs_embeds(tokens, embeds, is_media)[: starts[-1]]
        expected = torch.cat([rows[begin:end] for rows, begin, end in zip(whole, computed, ends, strict=True)])
        torch.testing.assert_close(read, expected, rtol=0, atol=CLOSE)


@pytest.mark.verify  # a Python with an interpreter of Triton; `test_v2.py` compares answers that depend on them
def test_positions_are_those_by_hand(qwen_checkpoint: Path) -> None:
    """Of Qwen2.5-VL, the one family whose positions are not those of its tokens in a row."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_positions", str(qwen_checkpoint)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "positions agree" in done.stdout
