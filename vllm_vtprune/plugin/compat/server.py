"""vLLM's server: options, shutdown, sender cache, handlers, media."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from typing import Any, TypeVar

import aiohttp
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm import AsyncEngineArgs, connections
from vllm.connections import HTTPConnection
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.media import MediaConnector, MediaIO
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.output_processor import OutputProcessor

from vllm_vtprune.plugin.compat.names import private, require

require(AsyncEngineArgs, "_resolve_device_ids")
require(BaseServing, "_get_trace_headers")
require(MediaConnector, "_load_data_url")
require(HTTPConnection, "_headers")
require(connections, "_async_read_response_bytes", "_async_retry")
require(OutputProcessor, "propagate_error")
require(OnlineRenderer, "preprocess_chat")
require(AnthropicServingMessages, "to_chat_completion_request", "message_stream_converter")
require(OpenAIServingResponses, "responses_full_generator", "responses_stream_generator")
require(OpenAIServingChatBatch, "render_batch_chat_request", "chat_completion_full_generator_batch")

Replacement = TypeVar("Replacement")
Fetch = TypeVar("Fetch", bound=Callable[..., Coroutine[Any, Any, Any]])


# --- Options ----------------------------------------------------------------------------------------------------------


def assigned_gpus(args: AsyncEngineArgs) -> list[int] | None:
    """Physical ids of the engines' GPUs from ``--device-ids``; None if it is unset.

    vLLM 0.32.0 resolves them when it builds the engine's configuration (engine/arg_utils.py), too late to size the KV
    cache. Remove when the method is public.
    """
    ids: list[int] | None = private(args, "_resolve_device_ids")()
    return ids


# --- Shutdown ---------------------------------------------------------------------------------------------------------


def engine_client_is_stopped(app_state: Any) -> bool:
    """Whether a server has stopped its engine client during shutdown; no more tokens will arrive.

    vLLM 0.32.0 (entrypoints/launchers/launcher.py) then sets ``should_exit`` of the uvicorn server in
    ``app.state.server``. Remove with `fail_unfinished_requests`.
    """
    server = getattr(app_state, "server", None)
    return server is not None and server.should_exit


def fail_unfinished_requests(engine_client: Any, error: Exception) -> None:
    """Raise ``error`` in every request that still waits for the engine.

    vLLM 0.32.0 stops the task that delivers the engine's outputs together with the engine. Unfinished requests, and
    their clients, would wait until the server is killed. Remove when vLLM ends them itself.
    """
    private(engine_client, "output_processor").propagate_error(error)


def before_shutdown(engine_client: Any, callback: Callable[[], None]) -> None:
    """Run a callback when the engine client begins to shut down.

    vLLM 0.32.0 exits with status 0 both after a stop signal and after the death of the engine. It shuts the engine
    client down before the server in the first case, and after it in the second (entrypoints/launchers/launcher.py). The
    client first closes the renderer (v1/engine/async_llm.py), and that its ``_resources`` (renderers/base.py). Remove
    when vLLM exits with another status after the engine's death.
    """
    private(engine_client.renderer, "_resources").callback(callback)


# --- The sender cache -------------------------------------------------------------------------------------------------


def after_images_were_sent(engine_client: Any, callback: Callable[[str], None]) -> None:
    """Call a callback with the hash of each image whose data was sent to the engine, in request order.

    vLLM 0.32.0 and 0.33.0 mark an image as sent earlier (renderers/base.py), even if its request is then rejected or
    cancelled. They send requests over one ordered connection (v1/engine/core_client.py), which has no hook. Remove when
    vLLM marks an image when it is sent.
    """
    core = private(engine_client, "engine_core")
    send = private(core, "add_request_async")

    async def add_request_async(request: Any) -> None:
        await send(request)
        for feature in request.mm_features or ():
            if feature.data is not None:
                callback(feature.mm_hash or feature.identifier)

    core.add_request_async = add_request_async


def known_images(cache: LruKeyReplicatedSenderCache) -> Mapping[str, object]:
    """The entries of a sender cache, by image hash.

    vLLM 0.32.0 keeps them in a private field (multimodal/cache/lru.py). Without them, our list of unsent images would
    grow forever. Remove with `after_images_were_sent`.
    """
    entries: Mapping[str, object] = private(cache, "_cache")
    return entries


# --- Handlers ---------------------------------------------------------------------------------------------------------


def take_over(replacement: type[Replacement], stock: Any) -> Replacement:
    """An instance of our subclass with the state of vLLM's handler or renderer. Do not use a handler afterwards.

    vLLM 0.32.0 builds them from two dozen options (entrypoints/generate/api_router.py) and accepts no other class.
    Remove when it does.
    """
    made = object.__new__(replacement)
    vars(made).update(vars(stock))
    return made


def accept_mm_kwargs(renderer: OnlineRenderer) -> bool:
    """Make a renderer forward every request's ``mm_processor_kwargs``.

    vLLM 0.32.0 forwards or rejects them for the whole server (renderers/online_renderer.py); without this, no policy
    would reach the processor. Remove when a handler can add its own arguments.

    Returns:
        Whether the renderer forwarded those of clients.
    """
    forwarded: bool = private(renderer, "trust_request_mm_kwargs")
    renderer.trust_request_mm_kwargs = True
    return forwarded


def replace_registry(models: OpenAIServingModels, registry: OpenAIModelRegistry) -> None:
    """Replace the registry in which a server lists and looks up its models.

    vLLM 0.32.0 creates its own (entrypoints/openai/models/serving.py), which does not know our aliases. Remove when
    vLLM accepts a registry from a plugin.
    """
    private(models, "registry")
    models.registry = registry


class PropagatesCurrentSpan:
    """Mixin before a vLLM serving class: engine spans become children of the current span.

    vLLM 0.32.0 passes the engine only the HTTP request's trace headers (entrypoints/serve/engine/serving.py,
    ``_get_trace_headers``), so its ``llm_request`` would start a new trace. Remove when it uses the current span.
    """

    async def _get_trace_headers(self, headers: Mapping[str, str]) -> Mapping[str, str] | None:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier or None


# --- Media ------------------------------------------------------------------------------------------------------------


class ReadsDataUrls(MediaConnector):
    """A media connector with its own reader of data URLs.

    vLLM 0.32.0 reads them in a private method (multimodal/media/connector.py) and answers invalid base64 with status
    500. Remove when the method is public.
    """

    @abstractmethod
    def load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        """The medium of a data URL."""

    def _load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        return self.load_data_url(url, media_io)


def request_headers(connection: HTTPConnection) -> MutableMapping[str, str]:
    """HTTP headers with which vLLM fetches media; private in vLLM 0.32.0 (connections.py).

    Remove when vLLM's connection can restrict addresses.
    """
    return connection._headers()


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int | None, **budgets: Any) -> bytes:
    """Read the body of a response, within vLLM's limits.

    Private in vLLM 0.32.0 (connections.py); 0.33.0 adds budgets per request. Remove with `request_headers`.
    """
    data: bytes = await connections._async_read_response_bytes(response, max_bytes, **budgets)
    return data


def retried(fetch: Fetch) -> Fetch:
    """Decorate a fetch that has a ``timeout`` with vLLM's retries.

    Private in vLLM 0.32.0 (connections.py). Remove with `request_headers`.
    """
    decorated: Any = connections._async_retry(fetch)
    return decorated


def is_too_large(error: Exception) -> bool:
    """Whether an error says that a medium exceeds vLLM's file size limit.

    vLLM 0.32.0 reports it as parameter ``audio_filesize_mb`` (multimodal/media/audio.py). Remove when the error has its
    own type.
    """
    return isinstance(error, VLLMValidationError) and error.parameter == "audio_filesize_mb"


def limit_message(error: Exception) -> str | None:
    """vLLM's message about a medium that exceeds a limit set by the operator; None for any other error.

    vLLM 0.32.0 names the environment variable in the text of a ``ValueError`` (multimodal/media). Other messages may
    reveal internals of the server. Remove when these errors have their own type.
    """
    message = str(error.args[0] if error.args else "").removeprefix("Failed to fetch media from URL: ")
    return message.removesuffix(".") if "VLLM_" in message else None
