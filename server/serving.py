"""vLLM's chat completion handler, extended by the policy of a request and the report of its response."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from copy import copy
from functools import partial
from http import HTTPStatus
from typing import Any, TypeAlias

from fastapi import Request
from opentelemetry.trace import use_span
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, PromptTokenUsageInfo
from vllm.outputs import RequestOutput

from vllm_vtprune import metrics
from vllm_vtprune.plugin import compat
from vllm_vtprune.plugin.early import EarlyEncoding, ExpectedImage
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.prompt import in_prompt_order
from vllm_vtprune.plugin.request import PRUNING_KEY
from vllm_vtprune.plugin.unpruned import unpruned_images
from vllm_vtprune.policy import PolicyError, PruningPolicy
from vllm_vtprune.report import ImageReport, RequestReport
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune_server.aliases import AliasedModels, UnknownPreset
from vllm_vtprune_server.errors import explain_image_error
from vllm_vtprune_server.policies import Policies
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.shutdown import ServerStopping, was_cut_short
from vllm_vtprune_server.stream import with_last_event_completed
from vllm_vtprune_server.trace import USAGE_KEY, Trace
from vllm_vtprune_server.tracing import record_stages, start_request_span
from vllm_vtprune_server.validation import InvalidField, bounded, explain

Results: TypeAlias = AsyncGenerator[RequestOutput, None]


class PruningServingChat(compat.PropagatesCurrentSpan, OpenAIServingChat):
    """Takes over a stock handler and adds pruning; chat templates, tools, streaming and sampling stay vLLM's."""

    processor: PruningProcessor | None  # None: the model cannot be pruned
    runtime: PruningRuntime
    policies: Policies
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
        """A handler with the settings of a stock one.

        Args:
            stock: the handler that vLLM built from its options; not used by this one afterwards.
            processor: the multimodal processor of this API process; None where it cannot prune.
            runtime: the processor's, or one without a tower.
            policies: presets and the default.
            trust_request_mm_kwargs: whether clients may send ``mm_processor_kwargs``.
        """
        serving = cls.__new__(cls)
        serving.__dict__.update(stock.__dict__)
        # Our own kwargs reach the processor through the renderer; clients' kwargs are checked before it sees them.
        serving.online_renderer = copy(stock.online_renderer)
        serving.online_renderer.trust_request_mm_kwargs = True
        serving.processor, serving.runtime = processor, runtime
        serving.policies = policies
        serving.trust_request_mm_kwargs = trust_request_mm_kwargs
        return serving

    async def create_chat_completion(
        self, request: ChatCompletionRequest, raw_request: Request | None = None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        if not isinstance(request, PruningChatCompletionRequest):
            return await super().create_chat_completion(request, raw_request)
        start_request_span(request.trace, {} if raw_request is None else raw_request.headers)
        try:
            with use_span(request.trace.span, record_exception=False):
                response = await self._create(request, raw_request)
        except Exception as error:
            request.trace.finish(_outcome(explain(error)), self.runtime.model_name)
            raise
        except BaseException:
            request.trace.finish("aborted", self.runtime.model_name)
            raise
        if isinstance(response, ErrorResponse):
            request.trace.finish(_outcome(response), self.runtime.model_name)
        return response

    async def _create(
        self, request: PruningChatCompletionRequest, raw_request: Request | None
    ) -> AsyncGenerator[str, None] | ChatCompletionResponse | ErrorResponse:
        try:
            self._resolve_alias(request)
        except UnknownPreset as error:
            metrics.ERRORS.labels(self.runtime.model_name, "policy").inc()
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
        """Put the model's own name in the place of an alias, and note the alias's preset."""
        registry: AliasedModels = self.models.registry
        resolved = registry.resolve(request.model)
        if resolved is not None:
            request.model, request.alias_preset = resolved

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        self._refuse_client_kwargs(request)
        if not isinstance(request, PruningChatCompletionRequest):
            return await super().render_chat_request(request)
        trace = request.trace
        report_id = uuid.uuid4().hex
        client_kwargs = dict(request.mm_processor_kwargs or {})
        try:
            policies = self._read_policies(request, trace)
            images = self._apply_policies(request, trace.policy, policies, report_id)
            waiting = metrics.REQUESTS_WAITING.labels(self.runtime.model_name).track_inprogress()
            early = None if self.processor is None else EarlyEncoding(self.processor, images, client_kwargs)
            with waiting if request.images else nullcontext(), early or nullcontext():
                rendered = await super().render_chat_request(request)
        except PolicyError as error:
            raise InvalidField(str(error), parameter=error.param) from error
        except Exception as error:
            if compat.says_shut_down(error):
                raise ServerStopping from error
            explained = explain_image_error(request.images, error)
            if explained is None:
                raise
            raise explained from error
        if not isinstance(rendered, ErrorResponse):
            trace.report = self._report(bool(images), report_id, rendered[1], trace.policy, policies)
            record_stages(trace.report)
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

    def _read_policies(self, request: PruningChatCompletionRequest, trace: Trace) -> list[PruningPolicy]:
        """The policy of each image of a request; notes that of the request itself.

        Raises:
            PolicyError: naming the field as the client wrote it.
        """
        asked = request.alias_preset if request.pruning is None else request.pruning
        trace.policy = self.policies.parse(asked)
        trace.preset = asked if isinstance(asked, str) else self.policies.default_preset if asked is None else None
        self._refuse_impossible(trace.policy, param="pruning")
        policies = []
        for image in request.images:
            param = f"{image.param}.pruning"
            policy = self.policies.parse(image.pruning, param=param, default=trace.policy)
            self._refuse_impossible(policy, param=param)
            policies.append(policy)
        return policies

    def _refuse_impossible(self, policy: PruningPolicy, param: str) -> None:
        if self.processor is not None:
            policy.resolve(self.processor.family, param=param)

    def _apply_policies(
        self,
        request: PruningChatCompletionRequest,
        own: PruningPolicy,
        policies: list[PruningPolicy],
        report_id: str,
    ) -> list[ExpectedImage]:
        """Hand the policies of a request and of its images to the processor.

        Returns:
            The images and what is to be done with them; empty where none has a policy, or the model cannot be pruned,
            and the request takes vLLM's stock path.
        """
        if self.processor is None or not any(policy.enabled for policy in policies):
            return []
        texts = [request.text_for(image, policy) for image, policy in zip(request.images, policies, strict=True)]
        request.mm_processor_kwargs = {
            **(request.mm_processor_kwargs or {}),
            PRUNING_KEY: {
                **own.dump(),
                "images": [policy.dump() for policy in policies],
                "texts": texts,
                "request_id": report_id,
            },
        }
        return [
            ExpectedImage(image.url or "", image.uuid, policy, text)
            for image, policy, text in zip(request.images, policies, texts, strict=True)
        ]

    def _report(
        self,
        pruned: bool,
        report_id: str,
        engine_inputs: list[Any],
        policy: PruningPolicy,
        policies: list[PruningPolicy],
    ) -> RequestReport:
        runtime = self.runtime
        if pruned:
            report = runtime.take_report(report_id)
            if report is None:
                raise RuntimeError("the multimodal processor left no pruning report")
            return report
        placeholders = engine_inputs[0].get("mm_placeholders", {})
        if self.processor is None:
            report = RequestReport(unpruned_images(placeholders, policies, policy))
        else:
            counts = [placeholder.get_num_embeds() for placeholder in placeholders.get("image", [])]
            images = [ImageReport("none", count, count) for count in counts]
            report = RequestReport(in_prompt_order(images, placeholders, policy))
        runtime.record_request(report, None)
        return report

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
        return _watch(results, request.trace, self.runtime.model_name, stream=bool(request.stream))


async def _watch(results: Results, trace: Trace, model_name: str, *, stream: bool) -> Results:
    """Pass results on, note in the trace when the first token came and how the request ended.

    A stream shows its first token. Otherwise the one result comes at the end, and vLLM's own statistics tell, unless
    they are off.
    """
    outcome: metrics.Outcome = "aborted"
    try:
        async with aclosing(results):
            async for result in results:
                if trace.ttft is None:
                    stats = result.metrics
                    if stream:
                        trace.note_first_token(time.time() - trace.started, model_name)
                    elif stats is not None and stats.first_token_latency > 0:
                        first_token = stats.arrival_time + stats.first_token_latency
                        trace.note_first_token(first_token - trace.started, model_name)
                if await was_cut_short(result):
                    raise ServerStopping
                if result.finished:
                    outcome = "finished"
                yield result
    except Exception:
        outcome = "failed"
        raise
    finally:
        trace.finish(outcome, model_name)


def _outcome(answer: ErrorResponse | None) -> metrics.Outcome:
    """Of a request that was answered with this error; None where the client is not to blame."""
    return "failed" if answer is None or answer.error.code >= 500 else "refused"


def _complete(response: ChatCompletionResponse, trace: Trace) -> None:
    """Add the report, and its short form to the usage; both models allow extra fields."""
    response.pruning = trace.to_json()
    tokens = trace.usage()
    if tokens is not None:
        details = response.usage.prompt_tokens_details or PromptTokenUsageInfo()
        setattr(details, USAGE_KEY, tokens)
        response.usage.prompt_tokens_details = details


def _complete_event(event: dict[str, Any], trace: Trace) -> None:
    """The same for the last event of a stream, which tells usage if the client or the operator wants it to."""
    event["pruning"] = trace.to_json()
    tokens = trace.usage()
    usage = event.get("usage")
    if usage is not None and tokens is not None:
        usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), USAGE_KEY: tokens}
