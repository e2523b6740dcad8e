"""The one place where requests of every API are pruned: vLLM's renderer, extended with a policy per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_vtprune import metrics
from vllm_vtprune.plugin.compat import server as compat
from vllm_vtprune.plugin.early import EarlyEncoding
from vllm_vtprune.plugin.image import ImageJob
from vllm_vtprune.plugin.placement import Role
from vllm_vtprune.plugin.processor import PruningProcessor
from vllm_vtprune.plugin.request import PRUNING_KEY, REPORT_KEY, PromptPruning
from vllm_vtprune.policy import PolicyError, PruningPolicy, preset_of
from vllm_vtprune.report import BypassReason, RequestReport, unpruned_media
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.sent_plan import PLANS, SentPlan
from vllm_vtprune_server.acceptance import Acceptance
from vllm_vtprune_server.content import misspelt
from vllm_vtprune_server.conversation import EARLIER, Conversation, ImagePart, listed, without_records
from vllm_vtprune_server.errors import MediaRejected, explain_image_error, explain_media_error, explain_truncation
from vllm_vtprune_server.policies import Policies
from vllm_vtprune_server.protocol import PruningRequest
from vllm_vtprune_server.shutdown import ServerStopping, failed_by_shutdown
from vllm_vtprune_server.tracing import record_stages
from vllm_vtprune_server.validation import InvalidField, not_accepted


class PruningRenderer(OnlineRenderer):
    """vLLM's renderer, which chat completions, batches, responses and messages share, with our policies.

    Attributes:
        processor: the multimodal processor of this API process; None if it cannot prune.
        runtime: the processor's runtime, or one without a vision encoder.
        policies: presets and default.
        acceptance: what the served model accepts.
        trust_client_mm_kwargs: whether clients may send ``mm_processor_kwargs``.
        returns_kept: whether every report says which tokens were kept.
        role: of the instance in encoder disaggregation.
    """

    processor: PruningProcessor | None
    runtime: PruningRuntime
    policies: Policies
    acceptance: Acceptance
    trust_client_mm_kwargs: bool
    returns_kept = False
    role: Role | None = None

    @classmethod
    def take_over(
        cls,
        stock: OnlineRenderer,
        *,
        processor: PruningProcessor | None,
        runtime: PruningRuntime,
        policies: Policies,
    ) -> PruningRenderer:
        """Create a renderer from vLLM's; see the attributes."""
        renderer = compat.take_over(cls, stock)
        renderer.processor, renderer.runtime, renderer.policies = processor, runtime, policies
        options = None if processor is None else processor.family.options
        renderer.acceptance = Acceptance(stock.renderer, options)
        renderer.trust_client_mm_kwargs = compat.accept_mm_kwargs(renderer)
        return renderer

    async def preprocess_chat(self, request: Any, messages: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Render one conversation, and prune its images.

        Raises:
            InvalidField: names the client's field, its value and what is accepted.
        """
        client_kwargs = getattr(request, "mm_processor_kwargs", None)
        validate_request_mm_kwargs(
            mm_processor_kwargs=client_kwargs,
            media_io_kwargs=getattr(request, "media_io_kwargs", None),
            trust_request_mm_kwargs=self.trust_client_mm_kwargs,
        )
        if not isinstance(request, PruningRequest):
            return await super().preprocess_chat(request, messages, *args, **kwargs)
        conversation, trace = request.conversation, request.trace
        messages = [listed(message) for message in messages]
        images = conversation.images_in(messages)
        try:
            pruning, presets = self._read_pruning(conversation, images)
            conversation.store(messages, images, pruning.policies, presets)
            texts = {**conversation.texts, EARLIER: messages} if conversation.continues else conversation.texts
            await self.acceptance.check(images, conversation.other_media, texts, client_kwargs or {})
            early: AbstractContextManager[object] = nullcontext()
            if self.processor is not None and any(policy.enabled for policy in pruning.policies):
                _set_kwargs(request, {**(client_kwargs or {}), PRUNING_KEY: pruning})
                early = EarlyEncoding(self.processor, pruning.images, client_kwargs or {})
            waiting = metrics.REQUESTS_WAITING.labels(self.runtime.model_name).track_inprogress()
            with waiting if images else nullcontext(), early:
                rendered = await super().preprocess_chat(request, without_records(messages), *args, **kwargs)
        except PolicyError as error:
            trace.refusal_detail = f"expected {error.accepted}"
            raise InvalidField(str(error), parameter=error.param) from error
        except Exception as error:
            if failed_by_shutdown(error):
                raise ServerStopping from error
            explanation = (
                explain_image_error(images, error)
                or explain_media_error(conversation.other_media, error)
                or explain_truncation(request, images or conversation.other_media, error)
            )
            if explanation is None:
                raise
            if isinstance(error, MediaRejected):
                trace.refusal_detail = str(error.problem)
            raise explanation from error
        finally:
            _set_kwargs(request, client_kwargs)
        _, [engine_input] = rendered
        conversation.report = self._report(engine_input, pruning)
        trace.add(conversation.report)
        record_stages(conversation.report)
        return rendered

    def _read_pruning(
        self, conversation: Conversation, images: Sequence[ImagePart]
    ) -> tuple[PromptPruning, list[str | None]]:
        """Parse the policies of a conversation and its images; record policy and preset in the trace.

        Returns:
            The policies, and the preset name of each image's policy.

        Raises:
            PolicyError: names the client's field.
        """
        trace = conversation.trace
        value, return_kept = self.policies.split(conversation.pruning)
        return_kept |= self.returns_kept
        value = trace.alias_preset if value is None else value
        plans = self._plans(conversation.plans, len(images))
        followed = self.role == "consumer"  # whether a policy can be followed depends on the image's plan
        trace.policy = self._policy(value, "pruning", return_kept, followed)
        trace.preset = self._preset(value)
        jobs, presets, labels = [], [], []
        for image, plan in zip(images, plans, strict=True):
            own, kept = self.policies.split(image.pruning, param=f"{image.param}.pruning")
            kept |= return_kept
            policy, preset, detail = self._policy_of(image, own, value, kept, followed=plan is not None)
            text = conversation.text_for(image, policy)
            job = ImageJob(policy, text, image.url or "", image.uuid, detail=detail, return_kept=kept)
            job.sends_plan, job.sent_plan = conversation.plans is True, plan
            if plan is not None and not policy.selects:
                problem = f"a plan for {image.field}, which this consumer does not prune"
                raise PolicyError(PLANS, None, "a producer with the same options as this consumer", problem)
            jobs.append(job)
            presets.append(preset)
            labels.append(_preset_label(policy, preset))
        trace.note_preset(labels or [_preset_label(trace.policy, trace.preset)])
        return PromptPruning(trace.policy, tuple(jobs)), presets

    def _plans(self, value: object, images: int) -> Sequence[SentPlan | None]:
        """The plan of each of so many images; None for each image without.

        Args:
            value: the request's `PLANS`; None if it sets none.

        Raises:
            InvalidField: this instance sends and follows none, or it is not accepted.
            PolicyError: an entry is no plan.
        """
        if value is None or (value is True and self.role == "producer"):
            return [None] * images
        if self.role is None:
            raise misspelt(PLANS)
        if self.role == "producer":
            raise not_accepted(PLANS, value, "true")
        if not isinstance(value, list) or len(value) != images:
            raise not_accepted(PLANS, value, f"a list with an entry for each of the {images} images")
        return [None if plan is None else SentPlan.read(plan, f"{PLANS}.{index}") for index, plan in enumerate(value)]

    def _policy_of(
        self, image: ImagePart, own: object, of_request: object, return_kept: bool, *, followed: bool
    ) -> tuple[PruningPolicy, str | None, str | None]:
        """The policy of an image, its preset name, and the ``detail`` that chose it.

        Args:
            image: the image.
            own: its own policy, as it is written; None if there is none.
            of_request: the policy of the request or of its model alias, as it is written; None if there is none.
            return_kept: whether the report says which tokens were kept.
            followed: whether a producer followed it.
        """
        if own is not None:
            policy = self._policy(own, f"{image.param}.pruning", return_kept, followed)
            if image.key:  # not of an earlier turn, whose request had it
                policy.refuse_request_scope(f"{image.param}.pruning")
            return policy, image.preset or self._preset(own), None
        chosen = self.policies.by_detail(image.detail)
        if chosen is None and of_request is None:
            chosen = self.policies.by_auto_detail
        if chosen is None:
            param = "pruning" if image.pruning is None else f"{image.param}.pruning"
            return self._policy(of_request, param, return_kept, followed), self._preset(of_request), None
        policy = self._policy(chosen, f"{image.param}.detail", return_kept, followed)
        policy.refuse_request_scope(f"{image.param}.detail")
        return policy, self._preset(chosen), image.detail or "auto"

    def _preset(self, value: object) -> str | None:
        """The preset name of a policy as it is written."""
        return self.policies.default_preset if value is None else preset_of(value)

    def _policy(self, value: object, param: str, return_kept: bool, followed: bool) -> PruningPolicy:
        """Parse a policy, and resolve it if the model can be pruned; see `_policy_of`."""
        policy = self.policies.parse(value, param=param)
        if self.processor is None:
            return policy
        resolved = policy.resolve(self.processor.family, param=param)
        if resolved.selects and not followed:  # refuses what this server does not select
            self.processor.place(resolved, return_kept=return_kept, param=param)
        return resolved

    def _report(self, engine_input: dict[str, Any], pruning: PromptPruning) -> RequestReport:
        """Take the report out of the processor's output, or make one for an unpruned request."""
        report: RequestReport | None = engine_input.pop(REPORT_KEY, None)
        if report is not None:
            return report
        reason: BypassReason = "unsupported_model" if self.processor is None else "unsupported_modality"
        placeholders: Mapping[str, Sequence[Any]] = engine_input.get("mm_placeholders", {})
        return RequestReport(unpruned_media(pruning.policies, placeholders, pruning.policy, reason, pruning.details))


def _set_kwargs(request: Any, kwargs: Mapping[str, Any] | None) -> None:
    request.mm_processor_kwargs = kwargs


def _preset_label(policy: PruningPolicy, preset: str | None) -> str:
    return preset or (metrics.CUSTOM if policy.enabled else metrics.NO_PRESET)
