"""vLLM's chat completion handler, extended with a policy per request and a report per response."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import Request
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, PromptTokenUsageInfo
from vllm.outputs import RequestOutput

from vllm_vtprune import metrics
from vllm_vtprune.plugin.compat import server as compat
from vllm_vtprune.plugin.early import EarlyEncoding
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import BypassReason, RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune_server.acceptance import Acceptance
from vllm_vtprune_server.aliases import AliasedModels, UnknownPreset
from vllm_vtprune_server.errors import MediaRejected, explain_image_error, explain_media_error, explain_truncation
from vllm_vtprune_server.policies import Policies
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.shutdown import ServerStopping, aborted_by_shutdown, failed_by_shutdown
from vllm_vtprune_server.stream import with_last_event_completed
from vllm_vtprune_server.trace import USAGE_KEY, Trace
from vllm_vtprune_server.tracing import record_stages
from vllm_vtprune_server.validation import InvalidField, bounded

Results: TypeAlias = AsyncGenerator[RequestOutput, None]


class PruningServingChat(compat.PropagatesCurrentSpan, OpenAIServingChat):
    """Adds pruning to a stock handler; chat templates, tools, streaming and sampling are vLLM's."""

    processor: PruningProcessor | None  # None: the model cannot be pruned
    runtime: PruningRuntime
    policies: Policies
    acceptance: Acceptance
    trust_request_mm_kwargs: bool

    @classmethod
    def take_over(
        cls,
        stock: OpenAIServingChat,
        *,
        processor: PruningProcessor | None,
        runtime: PruningRuntime,
        policies: Policies,
        trust_request_mm_kwargs: bool,
    ) -> PruningServingChat:
        """Create a handler from vLLM's.

        Args:
            stock: the handler that vLLM built from its options; do not use it afterwards.
            processor: the multimodal processor of this API process; None if it cannot prune.
            runtime: the processor's runtime, or one without a vision encoder.
            policies: presets and default.
            trust_request_mm_kwargs: whether clients may send ``mm_processor_kwargs``.
        """
        serving = compat.take_over(cls, stock)
        # the renderer must forward our own kwargs; `_refuse_client_kwargs` checks those of clients
        serving.online_renderer = compat.accept_mm_kwargs(stock.online_renderer)
        serving.processor, serving.runtime = processor, runtime
        serving.policies = policies
        options = None if processor is None else processor.family.options
        serving.acceptance = Acceptance(serving.online_renderer.renderer, options)
        serving.trust_request_mm_kwargs = trust_request_mm_kwargs
        return serving

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        if not isinstance(request, PruningChatCompletionRequest):
            return await super().create_chat_completion(request, raw_request)
        try:
            self._resolve_alias(request)
        except UnknownPreset as error:
            request.trace.unknown_preset = True
            return self.create_error_response(
                str(error), err_type="NotFoundError", status_code=HTTPStatus.NOT_FOUND, param="model"
            )
        response = await super().create_chat_completion(request, raw_request)
        if isinstance(response, ErrorResponse):
            return bounded(response)
        if isinstance(response, ChatCompletionResponse):
            _complete(response, request.trace)
            return response
        return with_last_event_completed(response, partial(_complete_event, trace=request.trace))

    def _resolve_alias(self, request: PruningChatCompletionRequest) -> None:
        """Replace an alias by its model's name, and record its preset."""
        registry: AliasedModels = self.models.registry
        resolved = registry.resolve(request.model)
        if resolved is not None:
            request.model, request.trace.alias_preset = resolved

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        self._refuse_client_kwargs(request)
        if not isinstance(request, PruningChatCompletionRequest):
            return await super().render_chat_request(request)
        trace = request.trace
        client_kwargs = dict(request.mm_processor_kwargs or {})
        try:
            pruning = self._read_pruning(request, trace)
            await self.acceptance.check(request)
            early: AbstractContextManager[object] = nullcontext()
            if self.processor is not None and any(policy.enabled for policy in pruning.policies):
                request.mm_processor_kwargs = {**client_kwargs, PRUNING_KEY: pruning}
                early = EarlyEncoding(self.processor, pruning.images, client_kwargs)
            waiting = metrics.REQUESTS_WAITING.labels(self.runtime.model_name).track_inprogress()
            with waiting if request.images else nullcontext(), early:
                rendered = await super().render_chat_request(request)
        except PolicyError as error:
            trace.refusal_detail = f"expected {error.accepted}"
            raise InvalidField(str(error), parameter=error.param) from error
        except Exception as error:
            if failed_by_shutdown(error):
                raise ServerStopping from error
            explanation = (
                explain_image_error(request.images, error)
                or explain_media_error(request.other_media, error)
                or explain_truncation(request, error)
            )
            if explanation is None:
                raise
            if isinstance(error, MediaRejected):
                trace.refusal_detail = str(error.problem)
            raise explanation from error
        if not isinstance(rendered, ErrorResponse):
            trace.report = self._report(rendered[1][0], pruning)
            record_stages(trace.report)
        return rendered

    def _refuse_client_kwargs(self, request: ChatCompletionRequest) -> None:
        kwargs = request.mm_processor_kwargs
        if kwargs and PRUNING_KEY in kwargs:
            raise InvalidField(
                f"mm_processor_kwargs.{PRUNING_KEY}: misplaced policy; expected it in the field {PRUNING_KEY}.",
                parameter=f"mm_processor_kwargs.{PRUNING_KEY}",
            )
        validate_request_mm_kwargs(
            mm_processor_kwargs=kwargs,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self.trust_request_mm_kwargs,
        )

    def _read_pruning(self, request: PruningChatCompletionRequest, trace: Trace) -> PromptPruning:
        """Parse the policies of a request and its images; record policy and preset in the trace.

        Raises:
            PolicyError: names the client's field.
        """
        value = trace.alias_preset if request.pruning is None else request.pruning
        trace.policy = self._policy(value, "pruning")
        trace.preset = value if isinstance(value, str) else self.policies.default_preset if value is None else None
        request_label = _preset_label(trace.policy, trace.preset)
        images, labels = [], []
        for image in request.images:
            policy, label = trace.policy, request_label
            if image.pruning is not None:
                policy = self._policy(image.pruning, f"{image.param}.pruning")
                policy.refuse_request_scope(f"{image.param}.pruning")
                label = _preset_label(policy, image.pruning if isinstance(image.pruning, str) else None)
            images.append(ImageJob(policy, request.text_for(image, policy), image.url or "", image.uuid))
            labels.append(label)
        trace.note_preset(labels or [request_label])
        return PromptPruning(trace.policy, tuple(images))

    def _policy(self, value: object, param: str) -> PruningPolicy:
        """Parse a policy, and resolve it if the model can be pruned."""
        policy = self.policies.parse(value, param=param)
        if self.processor is None:
            return policy
        resolved = policy.resolve(self.processor.family, param=param)
        if resolved.selects:
            self.processor.place(resolved, param=param)  # refuses what this server does not select
        return resolved

    def _report(self, engine_input: dict[str, Any], pruning: PromptPruning) -> RequestReport:
        """Take the report out of the processor's output, or make one for an unpruned request."""
        report: RequestReport | None = engine_input.pop(REPORT_KEY, None)
        if report is not None:
            return report
        reason: BypassReason = "unsupported_model" if self.processor is None else "unsupported_modality"
        placeholders = engine_input.get("mm_placeholders", {})
        return RequestReport(unpruned_media(pruning.policies, placeholders, pruning.policy, reason))

    def chat_completion_stream_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        watched = self._watched(request, result_generator, request_id)
        return super().chat_completion_stream_generator(request, watched, request_id, *args, **kwargs)

    async def chat_completion_full_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        *args: Any,
        **kwargs: Any,
    ) -> ErrorResponse | ChatCompletionResponse:
        watched = self._watched(request, result_generator, request_id)
        return await super().chat_completion_full_generator(request, watched, request_id, *args, **kwargs)

    def _watched(self, request: ChatCompletionRequest, results: Results, request_id: str) -> Results:
        if not isinstance(request, PruningChatCompletionRequest):
            return results
        request.trace.request_id = request_id
        return _watch(results, request.trace, stream=bool(request.stream))


async def _watch(results: Results, trace: Trace, *, stream: bool) -> Results:
    """Forward results and record the time to first token; fail if the engine aborted the request during shutdown.

    In a stream, the first result is the first token. Otherwise there is one result at the end, and the time comes from
    vLLM's statistics, unless they are off.
    """
    async with aclosing(results):
        async for result in results:
            if trace.ttft is None:
                stats = result.metrics
                if stream:
                    trace.ttft = time.time() - trace.started
                elif stats is not None and stats.first_token_latency > 0:
                    trace.ttft = stats.arrival_time + stats.first_token_latency - trace.started
            if await aborted_by_shutdown(result):
                raise ServerStopping
            yield result


def _preset_label(policy: PruningPolicy, preset: str | None) -> str:
    return preset or (metrics.CUSTOM if policy.enabled else metrics.NO_PRESET)


def _complete(response: ChatCompletionResponse, trace: Trace) -> None:
    """Add the report, and its short form to the usage; both models allow extra fields."""
    response.pruning = trace.to_json()
    tokens = trace.usage()
    if tokens is not None:
        details = response.usage.prompt_tokens_details or PromptTokenUsageInfo()
        setattr(details, USAGE_KEY, tokens)
        response.usage.prompt_tokens_details = details


def _complete_event(event: dict[str, Any], trace: Trace) -> None:
    """`_complete` for the last event of a stream, which holds usage only on request."""
    event["pruning"] = trace.to_json()
    tokens = trace.usage()
    usage = event.get("usage")
    if usage is not None and tokens is not None:
        usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), USAGE_KEY: tokens}
