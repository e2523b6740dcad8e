"""vLLM's chat completion handler, extended by the policy of a request and the report of its response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from copy import copy
from typing import Any, TypeAlias

from fastapi import Request
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.outputs import RequestOutput

from server.errors import explain_image_error
from server.protocol import PruningChatCompletionRequest, Trace
from server.stream import with_last_event_field
from server.validation import InvalidField, bounded
from vllm_vtprune import metrics
from vllm_vtprune.plugin.early import EarlyEncoding, ExpectedImage
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.request import PRUNING_KEY
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport

Results: TypeAlias = AsyncGenerator[RequestOutput, None]


class PruningServingChat(OpenAIServingChat):
    """Takes over a stock handler and adds pruning; chat templates, tools, streaming and sampling stay vLLM's."""

    processor: PruningProcessor
    default_policy: PruningPolicy
    default_preset: str | None
    trust_request_mm_kwargs: bool

    @classmethod
    def take_over(
        cls, stock: OpenAIServingChat, *, processor: PruningProcessor, default: object, trust_request_mm_kwargs: bool
    ) -> PruningServingChat:
        """A handler with the settings of a stock one.

        Args:
            stock: the handler that vLLM built from its options; not used by this one afterwards.
            processor: the multimodal processor of this API process.
            default: the policy of requests that name none, in any form that a request may use.
            trust_request_mm_kwargs: whether clients may send ``mm_processor_kwargs``.

        Raises:
            PolicyError: the default is not a policy.
        """
        serving = cls.__new__(cls)
        serving.__dict__.update(stock.__dict__)
        # Our own kwargs reach the processor through the renderer; clients' kwargs are checked before it sees them.
        serving.online_renderer = copy(stock.online_renderer)
        serving.online_renderer.trust_request_mm_kwargs = True
        serving.processor = processor
        serving.default_policy = PruningPolicy.parse(default, param="--pruning-default")
        serving.default_preset = default if isinstance(default, str) else None
        serving.trust_request_mm_kwargs = trust_request_mm_kwargs
        return serving

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        response = await super().create_chat_completion(request, raw_request)
        if isinstance(response, ErrorResponse):
            return bounded(response)
        if not isinstance(request, PruningChatCompletionRequest):
            return response
        if isinstance(response, ChatCompletionResponse):
            response.pruning = request.trace.to_json()  # the model allows extra fields
            return response
        return with_last_event_field(response, "pruning", request.trace.to_json)

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        self._refuse_client_kwargs(request)
        if not isinstance(request, PruningChatCompletionRequest):
            return await super().render_chat_request(request)
        trace = request.trace
        report_id = uuid.uuid4().hex
        client_kwargs = dict(request.mm_processor_kwargs or {})
        try:
            images = self._apply_policy(request, trace, report_id)
            with EarlyEncoding(self.processor, images, client_kwargs):
                rendered = await super().render_chat_request(request)
        except PolicyError as error:
            metrics.ERRORS.labels(self.processor.runtime.model_name, "policy").inc()
            raise InvalidField(str(error), parameter=error.param) from error
        except Exception as error:
            explained = explain_image_error(request.images, error)
            if explained is None:
                raise
            metrics.ERRORS.labels(self.processor.runtime.model_name, "image").inc()
            raise explained from error
        if not isinstance(rendered, ErrorResponse):
            trace.report = self._report(bool(images), report_id, rendered[1])
        return rendered

    def _refuse_client_kwargs(self, request: ChatCompletionRequest) -> None:
        kwargs = request.mm_processor_kwargs
        if kwargs and PRUNING_KEY in kwargs:
            raise InvalidField(
                f"mm_processor_kwargs.{PRUNING_KEY} is not accepted; expected the policy in the request's own "
                f"{PRUNING_KEY} field.",
                parameter=f"mm_processor_kwargs.{PRUNING_KEY}",
            )
        validate_request_mm_kwargs(
            mm_processor_kwargs=kwargs,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self.trust_request_mm_kwargs,
        )

    def _apply_policy(self, request: PruningChatCompletionRequest, trace: Trace, report_id: str) -> list[ExpectedImage]:
        """Validate the policies of a request and hand them to the processor.

        Returns:
            The images and what is to be done with them; empty where none has a policy and the request takes vLLM's
            stock path.

        Raises:
            PolicyError: naming the field as the client wrote it.
        """
        asked = request.pruning
        trace.policy = PruningPolicy.parse(asked, default=self.default_policy)
        trace.preset = asked if isinstance(asked, str) else self.default_preset if asked is None else None
        trace.policy.resolve(self.processor.family)
        policies = []
        for image in request.images:
            param = f"{image.param}.pruning"
            policy = PruningPolicy.parse(image.pruning, param=param, default=trace.policy)
            policy.resolve(self.processor.family, param=param)
            policies.append(policy)
        if not any(policy.enabled for policy in policies):
            return []
        texts = [request.text_for(image, policy) for image, policy in zip(request.images, policies, strict=True)]
        request.mm_processor_kwargs = {
            **(request.mm_processor_kwargs or {}),
            PRUNING_KEY: {
                **trace.policy.dump(),
                "images": [policy.dump() for policy in policies],
                "texts": texts,
                "request_id": report_id,
            },
        }
        return [
            ExpectedImage(image.url or "", image.uuid, policy, text)
            for image, policy, text in zip(request.images, policies, texts, strict=True)
        ]

    def _report(self, pruned: bool, report_id: str, engine_inputs: list[Any]) -> RequestReport:
        runtime = self.processor.runtime
        if pruned:
            report = runtime.take_report(report_id)
            if report is None:
                raise RuntimeError("the multimodal processor left no pruning report")
            return report
        placeholders = engine_inputs[0].get("mm_placeholders", {}).get("image", [])
        counts = [placeholder.get_num_embeds() for placeholder in placeholders]
        report = RequestReport([ImageReport("none", count, count) for count in counts])
        runtime.record_request(report, None)
        return report

    def chat_completion_stream_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        watched = _note_first_token(request, result_generator)
        return super().chat_completion_stream_generator(request, watched, *args, **kwargs)

    async def chat_completion_full_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        watched = _note_first_token(request, result_generator)
        return await super().chat_completion_full_generator(request, watched, *args, **kwargs)


async def _note_first_token(request: ChatCompletionRequest, results: Results) -> Results:
    """Pass results on and note in the request's trace when the first token came.

    A stream shows it. Otherwise the one result comes at the end, and vLLM's own statistics tell, unless they are off.
    """
    trace = request.trace if isinstance(request, PruningChatCompletionRequest) else Trace()
    async with aclosing(results):
        async for result in results:
            if trace.ttft is None:
                stats = result.metrics
                if request.stream:
                    trace.ttft = time.time() - trace.started
                elif stats is not None and stats.first_token_latency > 0:
                    trace.ttft = stats.arrival_time - trace.started + stats.first_token_latency
            yield result
