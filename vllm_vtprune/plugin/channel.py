"""Messages between two processes of one machine, over a Unix socket.

A message is a `msgspec.Struct`, sent in vLLM's msgpack format: a document, and the buffers of its tensors, uncopied.
The kernel reports at once that the other process has ended.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from vllm.logger import init_logger
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

logger = init_logger("vllm.vtprune")

COUNT = struct.Struct("<I")


class Channel:
    """Sends and receives messages on two threads of its own.

    Args:
        connection: a connected stream socket.
        incoming: type of the messages that the other side sends.
        on_message: called with each of them. An error closes the channel.
        on_close: called once, after the last message, when either side has closed the channel or ended.
    """

    def __init__(
        self,
        connection: socket.socket,
        incoming: Any,
        *,
        on_message: Callable[[Any], None],
        on_close: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._decoder = MsgpackDecoder(incoming)
        self._on_message, self._on_close = on_message, on_close
        self._outbox: SimpleQueue[Sequence[Any] | None] = SimpleQueue()
        self._reader, self._writer = (
            threading.Thread(target=target, name="vtprune-channel", daemon=True) for target in (self._read, self._write)
        )

    def start(self) -> None:
        self._writer.start()
        self._reader.start()

    def send(self, message: Any) -> None:
        """Queue a message. Safe in finalizers; without effect on a closed channel.

        Raises:
            TypeError: the message holds what msgpack cannot express.
        """
        self._outbox.put(MsgpackEncoder().encode(message))

    def close(self) -> None:
        """Close the connection; wakes the reading thread, here and on the other side."""
        with suppress(OSError):  # the other side was first
            self._connection.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while (buffers := self._outbox.get()) is not None:
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            sizes = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
            try:
                self._connection.sendall(COUNT.pack(len(views)) + sizes)
                for view in views:
                    self._connection.sendall(view)
            except OSError:
                self.close()
                return

    def _read(self) -> None:
        try:
            while True:
                (count,) = COUNT.unpack(self._receive(COUNT.size))
                sizes = struct.unpack(f"<{count}Q", self._receive(8 * count))
                self._on_message(self._decoder.decode([self._receive(size) for size in sizes]))
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("A message between an API process and the vision encoder process could not be handled")
        finally:
            self.close()
            self._outbox.put(None)
            self._writer.join()
            self._connection.close()
            self._on_close()

    def _receive(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            received = self._connection.recv_into(rest)
            if not received:
                raise EOFError
            rest = rest[received:]
        return data
