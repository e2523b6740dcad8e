"""The page at ``/`` (``--pruning-playground``): two policies side by side on one picture.

Its files are in ``page/``, as they are served. ``scene.jpg`` is a scene of the test split
(`vllm_vtprune_evaluation.scenes`); ``astronaut.jpg`` is `vllm_vtprune_evaluation.photo.photograph`.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _serve(path: str, file: Path) -> None:
    async def send() -> FileResponse:
        return FileResponse(file, headers=HEADERS)

    router.add_api_route(path, send, methods=["GET", "HEAD"])


_serve("/", PAGE / "index.html")
for _file in sorted(PAGE.iterdir()):
    if _file.name != "index.html":
        _serve(f"/playground/{_file.name}", _file)
