"""vLLM's server: its shutdown, its handlers, what it sends to its engine, and how it fetches media."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from copy import copy
from typing import Any, TypeVar

import aiohttp
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm import AsyncEngineArgs, connections
from vllm.connections import HTTPConnection
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry, OpenAIServingModels
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

Handler = TypeVar("Handler", bound=BaseServing)
Fetch = TypeVar("Fetch", bound=Callable[..., Coroutine[Any, Any, Any]])


# --- Options ----------------------------------------------------------------------------------------------------------


def assigned_gpus(args: AsyncEngineArgs) -> list[int] | None:
    """Physical ids of the GPUs that ``--device-ids`` gives to the engines; None where it is not set.

    vLLM 0.32.0 resolves them as it makes the engine's configuration (engine/arg_utils.py), which is too late for the
    size of the KV cache. Can go when the method is public.
    """
    ids: list[int] | None = private(args, "_resolve_device_ids")()
    return ids


# --- Shutdown ---------------------------------------------------------------------------------------------------------


def engine_client_is_stopped(app_state: Any) -> bool:
    """Whether a server that is shutting down has stopped its engine client, after which no more tokens come.

    vLLM 0.32.0 (entrypoints/launchers/launcher.py) keeps its uvicorn server in ``app.state.server`` and has it exit at
    that point. Can go with `fail_unfinished_requests`.
    """
    server = getattr(app_state, "server", None)
    return server is not None and server.should_exit


def fail_unfinished_requests(engine_client: Any, error: Exception) -> None:
    """Have every request that still waits for the engine raise ``error``.

    vLLM 0.32.0 stops the task that hands out the engine's outputs when it stops the engine, so requests that were not
    finished by then wait for ever, and their clients with them, until someone kills the server. Can go when vLLM ends
    them itself.
    """
    private(engine_client, "output_processor").propagate_error(error)


def before_shutdown(engine_client: Any, callback: Callable[[], None]) -> None:
    """Have a callback run when the engine client begins to shut down.

    vLLM 0.32.0 shuts it down before the server where that is told to stop, and after it where that ends by itself, as
    the engine died (entrypoints/launchers/launcher.py). Both end with status 0. What is shut down first is the renderer
    (v1/engine/async_llm.py), which closes ``_resources`` (renderers/base.py). Can go when vLLM's server ends with
    another status where its engine died.
    """
    private(engine_client.renderer, "_resources").callback(callback)


# --- The sender cache -------------------------------------------------------------------------------------------------


def after_images_were_sent(engine_client: Any, callback: Callable[[str], None]) -> None:
    """Have a callback told the hash of each image whose data was handed to the engine, in the order of the requests.

    vLLM 0.32.0 and 0.33.0 send requests over one ordered connection (v1/engine/core_client.py) and tell nobody. Needed
    to know what the engine has: vLLM notes an image before (renderers/base.py), so that one whose request is refused or
    given up in between is taken for sent. Can go when vLLM notes it when it is sent.
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
    """What a sender cache holds, by the hash of the image.

    vLLM 0.32.0 keeps it in a private field (multimodal/cache/lru.py). Without it the list of unsent images would grow
    for ever. Can go with `after_images_were_sent`.
    """
    known: Mapping[str, object] = private(cache, "_cache")
    return known


# --- Handlers ---------------------------------------------------------------------------------------------------------


def take_over(handler: type[Handler], stock: BaseServing) -> Handler:
    """A handler of our class with all that vLLM gave to its own, which is not to be used afterwards.

    vLLM 0.32.0 builds its handler from two dozen options (entrypoints/openai/generate/api_router.py) and has no place
    for a class of a plugin's. Can go when it does.
    """
    taken = object.__new__(handler)
    vars(taken).update(vars(stock))
    return taken


def trusting(renderer: OnlineRenderer) -> OnlineRenderer:
    """A copy of a renderer that passes ``mm_processor_kwargs`` on, whoever wrote them.

    vLLM 0.32.0 refuses them for the whole server or not at all (renderers/online_renderer.py), so a policy could not
    reach the processor. Can go when a handler can add arguments of its own.
    """
    private(renderer, "trust_request_mm_kwargs")
    renderer = copy(renderer)
    renderer.trust_request_mm_kwargs = True
    return renderer


def replace_registry(models: OpenAIServingModels, registry: OpenAIModelRegistry) -> None:
    """Have a server list and look up its models in another registry.

    vLLM 0.32.0 makes its own (entrypoints/openai/models/serving.py). Without ours, aliases would be no models. Can go
    when vLLM takes a registry from a plugin.
    """
    private(models, "registry")
    models.registry = registry


class PropagatesCurrentSpan:
    """Mixin before a serving class of vLLM: what its engine client traces is below the current span.

    vLLM 0.32.0 hands the engine only what the HTTP request carries (entrypoints/serve/engine/serving.py,
    ``_get_trace_headers``), so that its ``llm_request`` would be a trace of its own. Can go when it looks at the
    current span.
    """

    async def _get_trace_headers(self, headers: Mapping[str, str]) -> Mapping[str, str] | None:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier or None


# --- Media ------------------------------------------------------------------------------------------------------------


class ReadsDataUrls(MediaConnector):
    """A media connector that reads data URLs in its own way.

    vLLM 0.32.0 has a private method for them (multimodal/media/connector.py), which ends in status 500 for what is no
    base64. Can go when the method is public.
    """

    @abstractmethod
    def load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        """The medium of a data URL."""

    def _load_data_url(self, url: str, media_io: MediaIO[Any]) -> Any:
        return self.load_data_url(url, media_io)


def request_headers(connection: HTTPConnection) -> MutableMapping[str, str]:
    """Headers of the requests by which vLLM fetches media; 0.32.0 has a private method for them (connections.py).

    Can go when a connection can be told which addresses to refuse.
    """
    return connection._headers()


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int | None, **budgets: Any) -> bytes:
    """The body of a response, within the limits of vLLM.

    vLLM 0.32.0 has a private function for it (connections.py), 0.33.0 with budgets for a whole request. Can go as
    `request_headers`.
    """
    data: bytes = await connections._async_read_response_bytes(response, max_bytes, **budgets)
    return data


def retried(fetch: Fetch) -> Fetch:
    """Decorate what fetches with a ``timeout``: it is tried again as vLLM tries.

    vLLM 0.32.0 has a private decorator for it (connections.py). Can go as `request_headers`.
    """
    decorated: Any = connections._async_retry(fetch)
    return decorated


def is_too_large(error: Exception) -> bool:
    """Whether a medium has more bytes than its kind may have.

    vLLM 0.32.0 says so with the parameter ``audio_filesize_mb`` of whatever is read by its audio loader
    (multimodal/media/audio.py). Can go when the error has a type of its own.
    """
    return isinstance(error, VLLMValidationError) and error.parameter == "audio_filesize_mb"


def names_setting(error: Exception) -> str | None:
    """What vLLM says of a medium that is over a limit which the operator can set; None for any other error.

    vLLM 0.32.0 names the environment variable in a ``ValueError`` alone (multimodal/media). Other errors may tell of
    the inside of the server. Can go when these errors have a type of their own.
    """
    words = str(error.args[0] if error.args else "").removeprefix("Failed to fetch media from URL: ")
    return words.removesuffix(".") if "VLLM_" in words else None
