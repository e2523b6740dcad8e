"""``POST /v1/pruning/plan``: what pruning does to the images of a chat request, without an answer."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from vllm_vtprune_server.examples import PLAN
from vllm_vtprune_server.protocol import PruningChatCompletionRequest
from vllm_vtprune_server.route import PruningRoute
from vllm_vtprune_server.serving import PruningServingChat
from vllm_vtprune_server.validation import InvalidField, bounded, refused

router = APIRouter(route_class=PruningRoute)


class PlannedRequest(BaseModel):
    """What pruning does to the images of a chat request."""

    object: Literal["pruning.plan"] = "pruning.plan"
    prompt_tokens: int = Field(description="Tokens that a chat completion would prefill.")
    pruning: dict[str, Any] = Field(description="The report of a chat completion, with the kept positions.")


@router.post(
    "/v1/pruning/plan",
    dependencies=[Depends(validate_json_request)],
    response_model=None,  # a client that has hung up gets none
    responses={
        200: {"model": PlannedRequest, "content": {"application/json": {"example": PLAN}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
    },
)
@with_cancellation
async def plan(request: PruningChatCompletionRequest, raw_request: Request) -> Any:
    """The report that `/v1/chat/completions` would give to this body, with the kept positions and without an answer.

    Tokens are selected in the API process, as with `return_kept`. Fields about generation have no effect.
    """
    rendered = await planning(raw_request.app.state.openai_serving_chat).render_chat_request(request)
    if isinstance(rendered, ErrorResponse):
        error = bounded(rendered)
        return JSONResponse(error.model_dump(), status_code=error.error.code)
    prompt: list[int] = rendered[1][0]["prompt_token_ids"]
    return PlannedRequest(prompt_tokens=len(prompt), pruning=request.trace.to_json())


def planning(serving: PruningServingChat) -> PruningServingChat:
    """A handler that renders for the report alone: its items are not those that the engine is believed to hold.

    Raises:
        InvalidField: this process selects no tokens.
    """
    renderer = copy(serving.online_renderer)
    if renderer.processor is None:
        raise InvalidField("model: it cannot be pruned, so there is nothing to plan; expected another server.")
    if renderer.processor.engine_placement.choice == "engine":
        problem = "this server selects in its engine only, and plans need the API process"
        raise refused("pruning", problem, "a server with --pruning-placement auto or api")
    renderer.returns_kept = True
    renderer.render_chat = partial(renderer.render_chat, skip_mm_cache=True)
    serving = copy(serving)
    serving.online_renderer = renderer
    return serving
