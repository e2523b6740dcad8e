"""Reports of the requests to an `LLM`."""

from typing import Any

import pytest
from vllm import SamplingParams

from tests.support.engines import Engine, ask_about
from tests.support.images import sample_images
from vllm_vtprune import Reports

pytestmark = pytest.mark.engine


def test_an_llm_reports_by_request_id(cached: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = cached.llm.llm_engine.input_processor
    monkeypatch.setattr(processor, "process_inputs", processor.process_inputs)  # restored at the end
    reports = Reports(cached.llm)
    image_a, image_b = sample_images(2, stamp="reports")

    def prompt(*images: Any, pruning: object = None) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": ask_about("Where is the bus?", images=len(images))}
        if images:
            body["multi_modal_data"] = {"image": list(images)}
        return body if pruning is None else {**body, "mm_processor_kwargs": {"pruning": pruning}}

    prompts = [
        prompt(image_a, pruning={"budget": {"type": "tokens", "keep": 40}}),
        prompt(image_a),
        prompt(),
        prompt(image_a, image_b, pruning={"images": [False, "fast"]}),
    ]
    outputs = cached.llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
    assert list(reports) == [outputs[0].request_id, outputs[3].request_id]
    first, last = reports[outputs[0].request_id], reports[outputs[3].request_id]
    assert (first.visual_tokens, first.kept_tokens, first.images[0].nouns) == (576, 40, ("bus",))
    assert [image.kept_tokens for image in last.images] == [576, 64]
    with pytest.raises(KeyError):
        reports[outputs[1].request_id]
