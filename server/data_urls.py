"""Data URLs as clients write them."""

from __future__ import annotations

from vllm_vtprune_server.problem import MediaProblem

# In base64 that was escaped for a URL. Line breaks come last: what their removal puts together is no escape.
ESCAPES = {
    **{"%2B": "+", "%2b": "+", "%2F": "/", "%2f": "/", "%3D": "=", "%3d": "="},
    **{"%0D": "", "%0d": "", "%0A": "", "%0a": ""},
}


def read(url: str) -> tuple[str, str]:
    """What a data URL holds.

    Returns:
        Its media type, in small letters, and its data in base64, in the plain form where it has one. Data of
        ``video/jpeg``, which is a list, is left as it is.

    Raises:
        MediaProblem: it is not in base64.
    """
    header, comma, data = url.partition(":")[2].partition(",")
    media_type, _, parameters = header.lower().partition(";")
    if not comma or parameters.rpartition(";")[2].strip() != "base64":
        raise MediaProblem("is not a base64 data URL")
    media_type = media_type.strip()
    return media_type, data if media_type == "video/jpeg" else plain_base64(data)


def plain_base64(text: str) -> str:
    """Base64 that has one reading in its plain form: the standard alphabet, in one line, padded.

    One reading have line breaks anywhere, spaces around the text, ``-`` and ``_``, ``%2B``, ``%2F`` and ``%3D``, and
    missing or surplus ``=``. A space within the text may be a ``+`` that a form turned into one; so may a space at an
    end where digits are missing. Text without a plain form is left as what a strict decoder refuses.
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
