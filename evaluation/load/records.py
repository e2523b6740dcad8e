"""One record per request; every number of a load test is computed from records.

Definitions, as in ``vllm bench serve`` unless noted:

- Due: when the request is sent or, at a constant rate, its scheduled time. All times count from then. (vLLM: from
  sending.)
- TTFT, time to first token: from due, including connecting, to the first chunk with content. (vLLM: the first chunk
  with a choice, even if it holds only the role.)
- ITL, inter-token latencies: gaps between chunks with content; almost 0 for chunks that arrive together.
- E2E, end-to-end latency: from due to the last chunk with a choice, without the usage chunk and ``[DONE]``.
- TPOT, time per output token: (E2E - TTFT) / (output tokens - 1), for answers of at least two tokens.
- Token counts come from ``usage``, so the request must set ``stream_options.include_usage``.

Values that were not measured are None.
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
        elapsed: from due to the end of the stream or the failure.
        ttft: TTFT; None without content.
        itls: ITLs.
        e2e: E2E; None without a choice.
        input_tokens, output_tokens: from ``usage``.
        text: the answer.
        pruning: the server's report; None if there is none.
        error: the failure; None if it succeeded.
        lag: from due to sending, the client's part of the latency; None if it was not sent.
        stall: longest time that the client was blocked meanwhile; chunks may be timestamped this much too late.
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
        """Kept / visual tokens; None without a report or images."""
        images = self.pruning["images"] if self.pruning else ()
        visual = sum(image["visual_tokens"] for image in images)
        return sum(image["kept_tokens"] for image in images) / visual if visual else None


def save_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))


def load_records(path: Path) -> list[Record]:
    """Read a file of `save_records`."""
    records = []
    for line in path.read_text().split("\n")[:-1]:  # not splitlines: answers may hold other line breaks
        fields = json.loads(line)
        records.append(Record(**{**fields, "itls": tuple(fields["itls"])}))
    return records
