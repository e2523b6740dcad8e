"""The lines that a server logs when it answers: what it serves, and a request to copy."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shlex
import ssl
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress

import pybase64
from PIL import Image
from vllm.logger import init_logger

from vllm_vtprune import __version__
from vllm_vtprune_server.aliases import SEPARATOR
from vllm_vtprune_server.policies import Policies

POLL = 0.2  # seconds

SCENE = "SCENE"
"""Stands for the playground's picture, which the command fetches."""

logger = init_logger("vllm.vtprune")


async def say_when_ready(args: Namespace, model: str, policies: Policies, *, prunes: bool) -> None:
    """Log the version, the policies and a curl command once the server's port accepts connections.

    Args:
        args: the server's options.
        model: a name of the served model.
        policies: presets and default.
        prunes: whether the model can be pruned.
    """
    if getattr(args, "uds", None) or getattr(args, "headless", False):
        return
    host = args.host if args.host and args.host not in ("0.0.0.0", "::") else "localhost"
    while not await _accepts(host, args.port, tls=bool(args.ssl_certfile)):
        await asyncio.sleep(POLL)
    if prunes:
        default = policies.default_preset or (
            json.dumps(policies.default.dump()) if policies.default.enabled else "false"
        )
        logger.info(
            "vllm-vtprune %s prunes images of %s. Default: %s. Presets: %s. Methods and more: GET /v1/pruning",
            *(__version__, model, default, ", ".join(policies.available)),
        )
    if getattr(args, "pruning_playground", False):
        logger.info("The playground: %s/", root_of(args, host))
    logger.info("Ready. Try:")
    # without the name of the process before it, which vLLM gives every line
    os.write(2, f"{curl(args, host, model, list(policies.available) if prunes else ())}\n".encode())


def root_of(args: Namespace, host: str) -> str:
    """The server's URL, without a slash at its end."""
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if args.ssl_certfile else 'http'}://{name}:{args.port}{args.root_path or ''}"


def curl(args: Namespace, host: str, model: str, presets: Sequence[str]) -> str:
    """A command that sends a chat completion with an image.

    Args:
        args: the server's options.
        host: the server's name.
        model: a name of the served model.
        presets: those of which the request names one, if it can.
    """
    preset = f"{SEPARATOR}fast" if "fast" in presets else ""
    root = root_of(args, host)
    if getattr(args, "pruning_playground", False):
        question, url = "What color is the dot on the black triangle?", f"data:image/jpeg;base64,{SCENE}"
    else:
        image = io.BytesIO()
        Image.new("RGB", (56, 56), "orange").save(image, "PNG")
        question, url = "What color is this?", f"data:image/png;base64,{pybase64.b64encode(image.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": model + preset,
        "max_tokens": 16,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    }
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if args.api_key else []
    url = f"{root}/v1/chat/completions"
    command = shlex.join(["curl", url, "-H", "Content-Type: application/json", *key, "-d", json.dumps(body)])
    return command.replace(SCENE, f"'\"$(curl -s {shlex.quote(f'{root}/playground/scene.jpg')} | base64 -w 0)\"'")


async def _accepts(host: str, port: int, *, tls: bool) -> bool:
    context = None
    if tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except OSError:
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
