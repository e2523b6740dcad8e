"""What Model Runner V2, vLLM's default on GPUs, asks of our model classes; `test_v2.py` runs it whole.

Its batching of media is plain Python. The models are vLLM's own, with their own vision encoders for what is not pruned;
transformers says what should come out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.mm.encoder_runner import EncoderRunner

from tests.support.families import FAMILIES
from tests.support.images import sample_images
from tests.support.processors import features_of, process_prompt
from tests.support.served import Served, served
from tests.support.videos import VideoReference, video
from vllm_vtprune import PruningPolicy, plan_tokens

pytestmark = pytest.mark.usefixtures("placement_api")

QUESTION = "Where is the bus?"

ANSWERED = 5
"""The first token of an answer."""

CLOSE = 1e-4
"""Of an embedding: the same computation in another order of additions."""


@dataclass(frozen=True)
class Item:
    """An image or a video of a prompt: what the model gets of it, the places of its tokens, and what they should be."""

    feature: MultiModalFeatureSpec
    pruned: bool
    places: Tensor
    embeds: Tensor


@dataclass(frozen=True)
class Request:
    """`embeds` (L + 1, d): what the language model should read of the prompt and of an answer's first token."""

    prompt_ids: list[int]
    items: list[Item]
    embeds: Tensor


def name_of(image: Image.Image) -> str:
    return f"image {hash(image.tobytes())}"


class Requests:
    """Makes requests as they reach a runner, and says what it should make of them."""

    def __init__(self, served: Served, reference: VideoReference) -> None:
        self.served, self.reference = served, reference

    def of(self, *media: tuple[Any, Any]) -> Request:
        """A request with these images and videos (arrays), each with its policy; False leaves it unpruned."""
        images = [(medium, policy) for medium, policy in media if isinstance(medium, Image.Image)]
        videos = [video()] * (len(media) - len(images))
        kinds = [{"type": "image" if isinstance(medium, Image.Image) else "video"} for medium, _ in media]
        messages = [{"role": "user", "content": [*kinds, {"type": "text", "text": QUESTION}]}]
        prompt = self.reference.processor.apply_chat_template(messages, add_generation_prompt=True)
        processed = process_prompt(
            self.served.processor,
            prompt,
            [image for image, _ in images],
            videos=videos,
            uuids=[name_of(image) for image, _ in images],
            pruning={"images": [policy for _, policy in images], "texts": [QUESTION] * len(images)},
        )
        kept = [self._kept(*medium) for medium in media]
        read = self.reference.read(prompt, [medium for medium, _ in media], kept, [ANSWERED, ANSWERED])
        assert len(processed["prompt_token_ids"]) == len(read.prompt_ids)
        items = []
        for feature, (_, policy) in zip(features_of(processed), media, strict=True):
            place = feature.mm_position
            within = torch.arange(place.length) if place.is_embed is None else place.is_embed.nonzero()[:, 0]
            places = place.offset + within
            items.append(Item(feature, policy is not False, places, read.embeds[places]))
        return Request(processed["prompt_token_ids"], items, read.embeds)

    def _kept(self, medium: Any, policy: Any) -> Tensor | None:
        if policy is False:
            return None
        processor = self.served.processor
        features, nouns = processor.runtime.local.cache.get(name_of(medium)), self.reference.words(["bus"])
        return plan_tokens(features, PruningPolicy.parse(policy), nouns, family=processor.family).kept


@pytest.fixture(scope="module", params=["llava", "llava_next", "internvl", "qwen2_5_vl"])
def requests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Requests]:
    checkpoint = FAMILIES[request.param].write(tmp_path_factory.mktemp(request.param))
    with served(checkpoint) as served_model:
        yield Requests(served_model, VideoReference(checkpoint))


@torch.inference_mode()
def test_media_of_all_kinds_in_one_batch(requests: Requests) -> None:
    model, reference = requests.served.model, requests.reference
    few, many = ({"budget": {"type": "tokens", "keep": keep}} for keep in (24, 40))
    everything = {"budget": {"type": "ratio", "keep": 1.0}}
    tall, wide, square, other = (
        image.resize(size)
        for image, size in zip(sample_images(4), ((112, 448), (448, 112), (280, 280), (196, 252)), strict=True)
    )
    moving = [(video()[0], False)] if "video" in requests.served.processor.info.supported_mm_limits else []
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
    whole = [request.embeds for request in asked]
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
