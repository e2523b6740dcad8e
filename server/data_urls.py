"""Parse data URLs."""

from __future__ import annotations

from vllm_vtprune_server.problem import MediaProblem

# URL escapes in base64. Line breaks are last: their removal must not create escapes.
ESCAPES = {
    **{"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "="},
    **{"%0D": "", "%0d": "", "%0A": "", "%0a": ""},
}


def read(url: str) -> tuple[str, str]:
    """Parse a data URL.

    Returns:
        The media type in lower case, and the data in normalised base64. Data of ``video/jpeg``, a list, is unchanged.

    Raises:
        MediaProblem: the data is not base64.
    """
    header, comma, data = url.partition(":")[2].partition(",")
    media_type, _, parameters = header.lower().partition(";")
    if not comma or parameters.rpartition(";")[2].strip() != "base64":
        raise MediaProblem("is not a base64 data URL")
    media_type = media_type.strip()
    return media_type, data if media_type == "video/jpeg" else plain_base64(data)


def plain_base64(text: str) -> str:
    """Normalise base64: standard alphabet, one line, padded.

    Accepts line breaks, surrounding spaces, ``-`` and ``_``, ``%2B``, ``%2F`` and ``%3D``, and missing or surplus
    ``=``. Spaces inside the text are ambiguous, because a form may have turned a ``+`` into one; so are surrounding
    spaces if digits are missing. Ambiguous text keeps its spaces, so that a strict decoder rejects it.
    """
    if "%" in text:
        for escape, char in ESCAPES.items():
            text = text.replace(escape, char)
    line = text.replace("\r", "").replace("\n", "")
    inside = line.strip(" ")
    if inside != line and len(inside) % 4:
        return line
    digits = inside.rstrip("=").replace("-", "+").replace("_", "/")
    return digits + "=" * (-len(digits) % 4)
