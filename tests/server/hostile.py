"""Bodies that no client should send, the same ones in every run, by name."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from tests.server.test_images import saved
from tests.support.chat import url_of, url_of_bytes, user

WORDS = {"messages": "input", "max_tokens": "max_output_tokens"}
"""Fields of chat completions -> of responses."""

TOKENS = {"budget": {"type": "tokens", "keep": 40}}
PICTURE = Image.fromarray(np.random.default_rng(2024).integers(0, 256, (40, 40, 3), dtype=np.uint8))
URL = url_of(PICTURE)


def bodies(model: str, path: str = "/v1/chat/completions") -> dict[str, bytes]:
    """Name -> body, each complete but for what is wrong with it.

    Args:
        model: the name under which the server knows its model.
        path: the route whose words the bodies use.
    """
    base = {"model": model, "max_tokens": 3, "temperature": 0}
    translate = TRANSLATIONS.get(path, lambda body: body)
    named: dict[str, bytes] = {}
    for name, body in (
        *_policies(),
        *_policies_of_images(),
        *_images(),
        *_messages(),
        *_parameters(),
        *_bytes(json.dumps(translate({**base, "messages": [user("Where?", URL)], "pruning": TOKENS}))),
    ):
        named[name] = body if isinstance(body, bytes) else json.dumps(translate({**base, **body})).encode()
    return named


def as_batch(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a batch with one conversation."""
    return {**body, "messages": [body["messages"]]} if "messages" in body else body


def as_response(body: dict[str, Any]) -> dict[str, Any]:
    """The body for the Responses API."""
    return {
        WORDS.get(key, key): [_item(message) for message in value] if key == "messages" else value
        for key, value in body.items()
    }


def as_message(body: dict[str, Any]) -> dict[str, Any]:
    """The body for the Messages API."""
    return {key: [_blocks(message) for message in value] if key == "messages" else value for key, value in body.items()}


TRANSLATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "/v1/chat/completions/batch": as_batch,
    "/v1/responses": as_response,
    "/v1/messages": as_message,
    "/v1/messages/count_tokens": as_message,
}


def _item(message: Any) -> Any:
    if isinstance(message, dict) and message.get("role") == "tool":
        output = _parts_of(message, _response_part)["content"]
        return {"type": "function_call_output", "call_id": message["tool_call_id"], "output": output}
    return _parts_of(message, _response_part)


def _response_part(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") == "text":
        return {**part, "type": "input_text"}
    url = part.get("image_url")
    if part.get("type") == "image_url":
        return {
            **part,
            "type": "input_image",
            "image_url": url["url"] if isinstance(url, dict) and len(url) == 1 else url,
        }
    return part


def _blocks(message: Any) -> Any:
    message = _parts_of(message, _block)
    if isinstance(message, dict) and message.get("role") == "tool":
        result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
        return {"role": "user", "content": [result]}
    return message


def _block(part: dict[str, Any]) -> dict[str, Any]:
    if part.get("type") != "image_url":
        return part
    others = {key: value for key, value in part.items() if key not in ("type", "image_url")}
    value = part["image_url"]
    url = value.get("url") if isinstance(value, dict) else value
    inside = {key: inner for key, inner in value.items() if key != "url"} if isinstance(value, dict) else {}
    if not isinstance(url, str):
        return {"type": "image", "source": value, **others}
    kind, separator, data = url.partition(";base64,")
    source = (
        {"type": "base64", "media_type": kind.removeprefix("data:"), "data": data}
        if separator
        else {"type": "url", "url": url}
    )
    return {"type": "image", "source": {**source, **inside}, **others}


def _parts_of(message: Any, translate: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [translate(part) if isinstance(part, dict) else part for part in content]}


def _asked(**fields: Any) -> dict[str, Any]:
    return {"messages": [user("Where is the dog?", URL)], "pruning": TOKENS, **fields}


def _policies() -> Iterator[tuple[str, Any]]:
    deep: Any = 1
    for _ in range(400):
        deep = {"budget": deep}
    values: dict[str, Any] = {
        "an empty string": "",
        "a NUL": "\0",
        "a path": "../../etc/passwd",
        "a template": "{{7*7}}{% for x in range(10**9) %}{% endfor %}",
        "a format string": "%s%s%n{0.__class__}",
        "SQL": "'; DROP TABLE presets; --",
        "a megabyte": "x" * 2**20,
        "a thousand keys": {f"key{i}": i for i in range(1000)},
        "nested 400 deep": deep,
        "Python's own names": {"__class__": {"__init__": 1}, "__dict__": {}, "model_config": 1},
        "a method of vLLM": {"method": "__import__('os').system('true')"},
        "null for a method": {"method": None},
        "a float that is whole": {"budget": {"type": "tokens", "keep": 40.0}},
        "an exponent": {"budget": {"type": "tokens", "keep": 1e300}},
        "a negative zero": {"budget": {"type": "ratio", "keep": -0.0}},
        "the smallest float": {"budget": {"type": "ratio", "keep": 5e-324}},
        "a rank of millions": {"budget": {"type": "energy", "rank": 10**7, "solver": "rsvd"}},
        "iterations without end": {"budget": {"type": "energy", "solver": "rsvd", "power_iterations": 10**9}},
        "a query of white space": {"text": {"query": " \n\t\u200b" * 1000}},
        "a query of one long word": {"text": {"query": "x" * 4096}},
        "a query of marks": {"text": {"query": "\u0301" * 4096}},
        "a query of emoji": {"text": {"query": "\U0001f9d1\u200d\U0001f9b0" * 1000}},
        "a query of right-to-left marks": {"text": {"query": "\u202edog\u202c" * 500}},
        "a query of special tokens": {"text": {"query": "<image></s><pad><|im_start|>" * 100}},
        "texts from outside": {"texts": ["a"], "images": [False], "request_id": "x"},
    }
    for name, value in values.items():
        yield f"policy: {name}", _asked(pruning=value)


def _policies_of_images() -> Iterator[tuple[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": URL}}
    for name, value in {
        "a list": [TOKENS],
        "a megabyte": {"x" * 2**20: 1},
        "an image": part,
        "itself again": {"pruning": {"pruning": TOKENS}},
    }.items():
        yield f"of an image: {name}", {"messages": [user("Where?", {**part, "pruning": value})]}
    yield (
        "of an image: inside image_url",
        {"messages": [user("Where?", {"type": "image_url", "image_url": {"url": URL, "pruning": "fast"}})]},
    )
    yield (
        "of an image: at a text",
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "Where?", "pruning": {"alpha": -1}}]}
            ]
        },
    )
    yield "of an image: uuid is a list", {"messages": [user("Where?", {**part, "uuid": ["a"]})], "pruning": TOKENS}
    yield "of an image: uuid of a megabyte", {
        "messages": [user("Where?", {**part, "uuid": "u" * 2**20})], "pruning": TOKENS
    }  # fmt: skip
    yield "of an image: uuid with a NUL", {"messages": [user("Where?", {**part, "uuid": "\0"})], "pruning": TOKENS}


def _images() -> Iterator[tuple[str, Any]]:
    png = base64.b64decode(URL.partition(",")[2])
    data = {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        "HTML": b"<html><script>alert(1)</script></html>",
        "a zip": b"PK\x03\x04" + b"\0" * 60,
        "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "a numpy array": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "a PNG of 2^31 pixels a side": _png(2**31 - 1, 2**31 - 1, b""),
        "a PNG of 0 pixels": _png(0, 0, b""),
        "a PNG that is one row short": _png(40, 40, b"\0" * (39 * 121)),
        "a PNG of 90 megapixels of nothing": _png(9500, 9500, b""),
        "a PNG with a checksum that is wrong": png[:-6] + b"\0\0\0\0\0\0",
        "a PNG with megabytes of text": _png(4, 4, b"\0" * 52, text=b"a" * 2**22),
        "a PNG whose colours are missing": _png(8, 8, b"\0" * 72, colour=3),
        "a GIF of a large screen": b"GIF89a\xff\xff\xff\xff\x00\x00\x00" + b"," + b"\0" * 20,
        "an icon that lies about its size": _icon(_png(3000, 3000, b"\0" * (9001 * 3000))),
        "a TIFF that points at itself": b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 330, 4, 1, 8) + b"\x08\0\0\0",
        "a JPEG of headers alone": b"\xff\xd8" + b"\xff\xe1\xff\xff" + b"Exif\0\0" * 5 + b"\xff\xd9",
        "a WebP that ends early": b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f",
        "a line of pixels": saved(Image.new("RGB", (60_000, 1))),
    }
    for name, content in data.items():
        yield f"image: {name}", {"messages": [user("Where?", url_of_bytes(content))], "pruning": TOKENS}
    urls = {
        "a data URL in a data URL": f"data:image/png;base64,{base64.b64encode(URL.encode()).decode()}",
        "a media type of a megabyte": f"data:{'x' * 2**20};base64,AAAA",
        "base64 of a megabyte of dots": "data:image/png;base64," + "." * 2**20,
        "white space in base64": URL.replace("A", "A\n"),
        "an upper-case scheme": URL.replace("data:", "DATA:"),
        "metadata of the cloud": "http://169.254.169.254/latest/meta-data/",
        "a user in the host": "http://example.com@127.0.0.1/",
        "this machine in IPv6": "http://[::1]:8000/metrics",
        "a file of the server": "file:///proc/self/environ",
        "a URL with line breaks": "http://example.com/\r\nHost: internal\r\n\r\n",
        "gopher": "gopher://127.0.0.1:25/_HELO",
    }
    for name, url in urls.items():
        yield f"url: {name}", {"messages": [user("Where?", url)], "pruning": TOKENS}


def _messages() -> Iterator[tuple[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": URL}}
    for name, messages in {
        "none": [],
        "null": [None],
        "nested lists": [[[[user("Where?")]]]],
        "a role of a megabyte": [{"role": "x" * 2**20, "content": "Where?"}],
        "a system message with an image": [{"role": "system", "content": [part]}, user("Where?")],
        "an assistant with an image": [{"role": "assistant", "content": [part]}, user("Where?")],
        "a tool's answer with an image": [{"role": "tool", "tool_call_id": "x", "content": [part]}],
        "image tokens in the text": [user("<image><image><image> Where?", URL)],
        "no text beside the image": [{"role": "user", "content": [part]}],
        "an image in a string": [{"role": "user", "content": f"<img src='{URL}'>"}],
        "image tokens in a system message": [{"role": "system", "content": "<image>" * 999}, user("Where?", URL)],
        "image tokens and no image": [user("<image>" * 99)],
        "half an image token in each part": [user("age>", part, {"type": "text", "text": "<im"})],
        "an image token in a call of a tool": [
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "<image>"}'}}
                ],
            },
            user("Where?", URL),
        ],
        "a thousand empty parts": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1000}],
        "embeddings instead of an image": [user("Where?", {"type": "image_embeds", "image_embeds": "AAAA"})],
        "embeddings of no rows": [user("Where?", _embeds(np.zeros((0, 256), np.float32)))],
        "embeddings that are not finite": [user("Where?", _embeds(np.full((9, 256), np.nan, np.float32)))],
        "embeddings of objects": [user("Where?", _embeds(np.array([{"a": 1}])))],
        "embeddings of any length": [user("Where?", *(_embeds(np.ones((n, 256), np.float32)) for n in (1, 9, 30)))],
        "a video": [user("Where?", {"type": "video_url", "video_url": {"url": URL}})],
        "audio": [user("Where?", {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})],
        "an image that is null": [user("Where?", {"type": "image_url", "image_url": None})],
        "tool calls of nobody": [{"role": "assistant", "tool_calls": [{"id": 5}]}, user("Where?", URL)],
    }.items():
        yield f"messages: {name}", {"messages": messages, "pruning": TOKENS}


def _embeds(rows: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}


def _parameters() -> Iterator[tuple[str, Any]]:
    for name, fields in {
        "max_tokens of a googol": {"max_tokens": 10**100},
        "a million answers": {"n": 10**6},
        "a temperature that is no number": {"temperature": float("nan")},
        "top_p of 0": {"top_p": 0, "temperature": 1},
        "a bias for tokens that do not exist": {"logit_bias": {"999999": 5}},
        "a thousand stops": {"stop": ["x"] * 1000},
        "a schema that is a number": {"response_format": {"type": "json_schema", "json_schema": 5}},
        "a regular expression that does not close": {"structured_outputs": {"regex": "((("}},
        "a choice of nothing": {"structured_outputs": {"choice": []}},
        "processor options": {"mm_processor_kwargs": {"pruning": "fast", "__class__": 1}},
        "media options": {"media_io_kwargs": {"image": {"rgba_background_color": "red"}}},
        "a chat template": {"chat_template": "{% for i in range(10**9) %}{{ i }}{% endfor %}"},
    }.items():
        yield f"parameter: {name}", _asked(**fields)


def _bytes(good: str) -> Iterator[tuple[str, Any]]:
    yield "bytes: a byte-order mark", b"\xef\xbb\xbf" + good.encode()
    yield "bytes: UTF-16", good.encode("utf-16")
    yield "bytes: the field twice", good.replace('"pruning"', '"pruning": "nope", "pruning"').encode()
    yield "bytes: a comment", good.replace("{", "{/* */", 1).encode()
    yield "bytes: half a character", good.replace("Where?", "\\ud800").encode()
    yield "bytes: a number of 5,000 digits", good.replace(": 40", f": {'9' * 5000}").encode()
    yield "bytes: nothing but brackets", b'{"pruning":' * 50_000


def _png(width: int, height: int, rows: bytes, *, colour: int = 2, text: bytes = b"") -> bytes:
    """A PNG file that says what it is told to."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    texts = chunk(b"zTXt", b"note\0\0" + zlib.compress(text)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + header + texts + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _icon(png: bytes) -> bytes:
    """An icon file that announces one picture of 16 x 16 pixels."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 24, len(png), 22) + png
