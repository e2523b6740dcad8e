"""One encoder for several API processes: the protocol, over a real socket, with a model that computes nothing."""

import gc
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
)

from vllm_vtprune.encoder import Encoded
from vllm_vtprune.features import EMBED, Layout, PreparedImage, Tiles, VisualFeatures
from vllm_vtprune.plugin.encoder_client import EncoderClient, EncoderUnavailable
from vllm_vtprune.plugin.encoder_server import EncoderServer
from vllm_vtprune.policy import LLAVA, PolicyError, PruningPolicy
from vllm_vtprune.runtime import PruningRuntime
from vllm_vtprune.vision_encoder import EncoderError

POLICY = PruningPolicy.parse({"budget": {"type": "energy", "min_tokens": 3, "max_tokens": 6}}).resolve(LLAVA)
PARAMETERS = 7
WIDTH = 8


def image_of(seed: int, **layout: Any) -> PreparedImage:
    """Its features are its pixel values."""
    pixels = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    fields = {
        "pixel_values": MultiModalFieldElem(pixels, MultiModalFlatField(slices=[slice(0, 12)])),
        "sizes": MultiModalFieldElem(torch.tensor([3, 4]), MultiModalBatchedField(keep_on_cpu=True)),
    }
    return PreparedImage(MultiModalKwargsItem(fields), Layout(12, **{"grid": (3, 4), **layout}))


class VisionEncoder:
    device, dtype, weights, num_parameters, nbytes = torch.device("cpu"), torch.bfloat16, "checkpoint", PARAMETERS, 0

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()

    def encode(self, images: Sequence[PreparedImage]) -> list[VisualFeatures]:
        self.began.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.batches.append(len(images))
        return [features_of(image) for image in images]

    def token_rows(self, token_ids: Sequence[int]) -> torch.Tensor:
        return torch.eye(WIDTH, dtype=self.dtype)[list(token_ids)]


def features_of(image: PreparedImage) -> VisualFeatures:
    pixels, layout = image.item["pixel_values"].data, image.layout
    assert image.item["sizes"].data.tolist() == [3, 4]
    return VisualFeatures(
        pixels,
        pixels,
        layout.grid,
        layout.tiles,
        cls_attention=pixels[:, 0].float().softmax(0),
        deepstack=pixels[:, :2],
        prompt=layout.prompt,
    )


class Shared:
    """An encoder server in this process, and how to end it as a killed process would."""

    def __init__(self, path: Path) -> None:
        self.vision_encoder = VisionEncoder()
        self.loads = 0
        self.runtime = PruningRuntime(self._load, LLAVA, "shared")  # type: ignore[arg-type]
        self.renewals: list[object] = []
        self.server = EncoderServer(self.runtime, clients=2, follow=self._follow, warm_up=self._warm_up)
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            self.server.serve(self._listener)

    def _load(self) -> VisionEncoder:
        if self.vision_encoder.error is not None:
            raise self.vision_encoder.error
        self.loads += 1
        return self.vision_encoder

    def _follow(self) -> None:
        if self.renewals:
            self.renewals.clear()
            self.runtime.renew()

    def _warm_up(self) -> None:
        self.runtime.local.vision_encoder.token_rows([0])

    def end(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for session in list(self.server.sessions):
            session.channel.close()

    @property
    def tickets(self) -> int:
        return sum(len(session._tickets) for session in self.server.sessions)


@pytest.fixture
def path() -> Iterator[Path]:
    folder = Path(mkdtemp(prefix="vtprune-"))  # pytest's own folders have longer names than sockets may
    yield folder / "cpu"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def shared(path: Path) -> Iterator[Shared]:
    shared = Shared(path)
    yield shared
    shared.vision_encoder.gate.set()
    shutil.rmtree(path.parent)
    shared.end()


def client_of(path: Path) -> EncoderClient:
    client = EncoderClient(path)
    client.connect()
    return client


@pytest.fixture
def client(shared: Shared, path: Path) -> EncoderClient:
    return client_of(path)


def eventually(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


TILES = Tiles(torch.tensor([0] * 6 + [1] * 6), ((2, 3), (2, 3)), (None, (0.0, 0.0, 1.0, 1.0)))


@pytest.mark.parametrize(
    "layout",
    [{}, {"grid": None, "tiles": TILES}, {"grid": None, "prompt": (5, *[EMBED] * 12, 6)}],
    ids=["grid", "tiles", "text"],
)
@pytest.mark.parametrize("nouns", [(), (1, 5)])
def test_an_image_is_planned_as_in_this_process(client: EncoderClient, layout: Any, nouns: tuple[int, ...]) -> None:
    runtime = PruningRuntime(VisionEncoder, LLAVA, "local")  # type: ignore[arg-type]
    policy = PruningPolicy.parse(POLICY.dump()).resolve(LLAVA)
    image = image_of(1, **layout)
    plans = [
        vars(encoder.plan_image(encoder.submit("a", image).result(60), policy, nouns, "a"))
        for encoder in (client, runtime.local)
    ]
    for plan in plans:
        assert plan.pop("timings").keys() == {"budget", "select"}
    for name, value in plans[0].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == plans[1][name].dtype
            assert torch.equal(value, plans[1][name])
        else:
            assert value == plans[1][name], name
    assert 3 <= len(plans[0]["kept"]) <= 6


def test_an_image_of_two_processes_is_encoded_once(shared: Shared, client: EncoderClient, path: Path) -> None:
    other = client_of(path)
    assert client.find("a") is None
    shared.vision_encoder.gate.clear()
    first = client.submit("a", image_of(1))
    assert shared.vision_encoder.began.wait(60)
    future = other.find("a")
    assert not future.done()
    shared.vision_encoder.gate.set()
    encoded = [first.result(60), future.result(60), other.submit("a", image_of(1)).result(60)]
    assert [image.fresh for image in encoded] == [True, False, False]
    assert encoded[0].forward == encoded[1].forward is not None
    assert encoded[2].forward is None
    assert shared.vision_encoder.batches == [1]


def test_images_of_two_processes_share_a_batch(shared: Shared, client: EncoderClient, path: Path) -> None:
    other = client_of(path)
    shared.vision_encoder.gate.clear()
    waiting = [client.submit("first", image_of(0))]
    assert shared.vision_encoder.began.wait(60)
    waiting += [client.submit("a", image_of(1)), other.submit("b", image_of(2))]
    eventually(lambda: shared.tickets == 3)
    shared.vision_encoder.gate.set()
    encoded = [future.result(60) for future in waiting]
    assert shared.vision_encoder.batches == [1, 2]
    assert encoded[1].forward == encoded[2].forward


@pytest.mark.parametrize("leave", ["cancel", "disconnect"])
def test_an_image_that_nobody_waits_for_is_not_encoded(
    shared: Shared, client: EncoderClient, path: Path, leave: str
) -> None:
    leaving = client_of(path)
    shared.vision_encoder.gate.clear()
    first = client.submit("first", image_of(0))
    assert shared.vision_encoder.began.wait(60)
    unwanted = leaving.submit("unwanted", image_of(1))
    eventually(lambda: shared.tickets == 2)
    if leave == "cancel":
        unwanted.cancel()
    else:
        assert leaving._channel is not None
        leaving._channel.close()
    eventually(lambda: shared.tickets == 1)
    shared.vision_encoder.gate.set()
    first.result(60)
    client.submit("last", image_of(2)).result(60)
    assert shared.vision_encoder.batches == [1, 1]
    with pytest.raises(CancelledError if leave == "cancel" else EncoderUnavailable):
        unwanted.result(60)


def test_features_are_held_until_their_request_has_ended(
    shared: Shared, client: EncoderClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Encoded[Any] | None = client.submit("a", image_of(1)).result(60)
    shared.runtime.forget_images()
    assert encoded is not None
    for _ in range(2):
        assert client.plan_image(encoded, POLICY, ()).tokens == 12
    del encoded
    gc.collect()
    eventually(lambda: shared.tickets == 0)


def test_emptying_the_cache_is_done_when_it_returns(shared: Shared, client: EncoderClient) -> None:
    client.submit("a", image_of(1)).result(60)
    assert shared.runtime.local.cache.nbytes > 0
    client.forget_images()
    assert shared.runtime.local.cache.nbytes == 0
    assert client.find("a") is None


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (EncoderError("no weights"), EncoderError),
        (ValueError("not finite"), ValueError),
        (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError),
        (KeyError("x"), RuntimeError),
    ],
)
def test_errors_keep_message_and_kind(
    shared: Shared, client: EncoderClient, error: Exception, raised: type[Exception]
) -> None:
    client.submit("a", image_of(1)).result(60)
    shared.vision_encoder.error = error
    with pytest.raises(raised, match=str(error)) as failed:
        client.submit("b", image_of(2)).result(60)
    assert type(failed.value) is raised
    shared.vision_encoder.error = None
    assert client.submit("b", image_of(2)).result(60).fresh, "the next one is not affected"


def test_a_policy_s_error_keeps_its_field(client: EncoderClient) -> None:
    encoded = client.submit("a", image_of(1)).result(60)
    needs_keys = PruningPolicy.parse({"method": "visionzip", "budget": {"type": "tokens", "keep": 3}}).resolve(LLAVA)
    with pytest.raises(PolicyError) as refused:
        client.plan_image(encoded, needs_keys, ())
    assert refused.value.param == "pruning.method"
    assert "visionzip needs" in str(refused.value)


def test_an_item_that_cannot_be_sent_fails_alone(client: EncoderClient) -> None:
    strange = PreparedImage(MultiModalKwargsItem({"x": object()}), Layout(12, grid=(3, 4)))  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        client.submit("strange", strange)
    assert client.submit("a", image_of(1)).result(60).fresh


def test_the_encoder_is_loaded_once_and_every_process_knows(shared: Shared, client: EncoderClient, path: Path) -> None:
    other = client_of(path)
    assert client.num_parameters is None
    for each in (client, other):
        each.warm_up(image_of(0))
    eventually(lambda: client.num_parameters == other.num_parameters == PARAMETERS)
    assert shared.loads == 1
    late = client_of(path)
    eventually(lambda: late.num_parameters == PARAMETERS)
    client.submit("a", image_of(1)).result(60)
    shared.renewals.append("other weights")
    assert client.find("a") is None, "features of the old weights"
    eventually(lambda: late.num_parameters is None)
    client.submit("a", image_of(1)).result(60)
    assert shared.loads == 2


def test_weights_that_cannot_be_loaded_fail_the_start(shared: Shared, client: EncoderClient) -> None:
    shared.vision_encoder.error = EncoderError("model: cannot load the vision encoder")
    with pytest.raises(EncoderError, match="cannot load the vision encoder"):
        client.warm_up(image_of(0))


def test_its_death_fails_everything_at_once_until_the_next_one_is_ready(
    shared: Shared, client: EncoderClient, path: Path
) -> None:
    kept = client.submit("kept", image_of(0)).result(60)
    shared.vision_encoder.gate.clear()
    shared.vision_encoder.began.clear()
    waiting: Future[Any] = client.submit("a", image_of(1))
    assert shared.vision_encoder.began.wait(60)
    shared.end()
    with pytest.raises(EncoderUnavailable, match=r"^The vision encoder process ended; it is being restarted. Retry.$"):
        waiting.result(10)
    image_future = client.find("a")
    assert image_future is not None
    for future in (image_future, client.submit("b", image_of(2))):
        with pytest.raises(EncoderUnavailable) as unavailable:
            future.result(0)
        assert unavailable.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    with pytest.raises(EncoderUnavailable):
        client.plan_image(kept, POLICY, ())
    client.forget_images()
    assert client.num_parameters is None

    following = Shared(path)
    eventually(lambda: client._channel is not None)
    assert client.submit("a", image_of(1)).result(60).fresh
    with pytest.raises(EncoderUnavailable):
        client.plan_image(kept, POLICY, ())
    following.end()


def test_a_process_that_never_started_ends_the_wait(path: Path) -> None:
    shutil.rmtree(path.parent)
    with pytest.raises(EncoderError, match="did not start"):
        EncoderClient(path).connect()
