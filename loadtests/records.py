"""One record for each request; every number of a load test is computed from these.

Definitions, as in ``vllm bench serve`` except where it is said:

- A request is due when it is sent, or, at a constant rate, when the schedule says; all times count from then. (vLLM
  counts from sending.)
- TTFT, time to first token: from when the request is due, connecting included, to the first chunk with content. (vLLM
  takes the first chunk with a choice, also where it holds only the role.)
- ITL, inter-token latencies: the gaps between chunks with content. Chunks that came in one piece have next to none.
- E2E, end-to-end latency: to the last chunk with a choice; the usage chunk and ``[DONE]`` do not count.
- TPOT, time per output token: (E2E - TTFT) / (output tokens - 1), for answers of two tokens or more.
- Token counts are those of ``usage``, so the request has to ask for it (``stream_options.include_usage``).

What was not measured is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One request; times in seconds, as defined at the top of this module.

    Attributes:
        name: the kind of request, for grouping.
        started: when it was due, in seconds since the epoch.
        elapsed: from then to the end of the stream, or to the failure.
        ttft: to the first chunk with content; None where none came.
        itls: gaps between chunks with content.
        e2e: to the last chunk with a choice; None where none came.
        input_tokens: that were prefilled, by ``usage``.
        output_tokens: by ``usage``.
        text: the answer.
        pruning: the server's report, None where there was none.
        error: why it failed; None where it did not.
        lag: from when it was due to when it was sent, the client's part of the latency; None where it was not sent.
        stall: the longest that the client was busy otherwise in the meantime: chunks may be stamped so much too late.
    """

    name: str
    started: float
    elapsed: float
    ttft: float | None = None
    itls: tuple[float, ...] = ()
    e2e: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""
    pruning: Mapping[str, Any] | None = None
    error: str | None = None
    lag: float | None = 0.0
    stall: float = 0.0

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.ttft is None or self.e2e is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.output_tokens - 1)

    @property
    def keep_ratio(self) -> float | None:
        """Visual tokens kept, of those there were; None without a report or an image."""
        images = self.pruning["images"] if self.pruning else ()
        before = sum(image["visual_tokens"] for image in images)
        return sum(image["kept_tokens"] for image in images) / before if before else None


def save_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file of one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def load_records(path: Path) -> list[Record]:
    """Read what `save_records` wrote."""
    found = []
    for line in path.read_text().split("\n")[:-1]:  # not splitlines: answers may hold other line breaks
        fields = json.loads(line)
        found.append(Record(**{**fields, "itls": tuple(fields["itls"])}))
    return found
