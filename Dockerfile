# syntax=docker/dockerfile:1.7
# The server, on vLLM's own image: `docker build .` for GPUs, `docker build --build-arg DEVICE=cpu .` for CPUs.
ARG VLLM_VERSION=0.32.0
ARG DEVICE=gpu

FROM vllm/vllm-openai:v${VLLM_VERSION} AS base-gpu
ARG VLLM_VERSION
LABEL org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v${VLLM_VERSION}"

FROM vllm/vllm-openai-cpu:v${VLLM_VERSION} AS base-cpu
ARG VLLM_VERSION
LABEL org.opencontainers.image.base.name="docker.io/vllm/vllm-openai-cpu:v${VLLM_VERSION}"

FROM python:3.12-slim-bookworm AS wheels
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY vllm_vtprune vllm_vtprune
COPY checkpoints checkpoints
COPY server server
COPY evaluation evaluation
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
# spaCy's model is not on PyPI. The hash is that of the release; the build stops if the file has another.
ADD --checksum=sha256:1932429db727d4bff3deed6b34cfc05df17794f4a52eeb26cf8928f7c1a0fb85 \
    https://github.com/explosion/spacy-models/releases/download/en_core_web_sm-3.8.0/en_core_web_sm-3.8.0-py3-none-any.whl \
    /wheels/

# hadolint ignore=DL3006
FROM base-${DEVICE} AS server
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vllm-vtprune" \
      org.opencontainers.image.description="vLLM's OpenAI-compatible server with visual token pruning" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 0
# Without dependencies, so that nothing is replaced that vLLM needs. A pin would still replace what the image holds in another
# version, so what was there is listed before and looked for after: the build stops, and names what changed, if any is gone.
# Both of vLLM's images bring uv.
RUN --mount=type=bind,source=deploy/docker/requirements.txt,target=/requirements.txt \
    --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    UV_PYTHON="$(command -v python3)" && export UV_PYTHON \
    && uv pip freeze >/opt/before \
    && uv pip install --no-cache --no-deps --require-hashes --requirement /requirements.txt \
    && uv pip install --no-cache --no-deps /wheels/*.whl \
    && uv pip freeze >/opt/after \
    && ! grep -vxFf /opt/after /opt/before \
    && rm /opt/before /opt/after
# Stop the build, not the server, where the plugin or the model of the text pipeline does not load.
RUN vtprune --version && python3 -c "from vllm_vtprune.plugin.register import register; register()"
RUN python3 -c "import spacy; spacy.load('en_core_web_sm')"
COPY --chmod=755 deploy/docker/vllm /opt/vtprune/bin/vllm
ENV PATH=/opt/vtprune/bin:${PATH}
# Recent images of vLLM have this user. Group 0 may write, for clusters that choose the user.
RUN { id -u vllm >/dev/null 2>&1 || useradd --uid 2000 --gid 0 --create-home vllm; } \
    && mkdir -p /home/vllm/.cache && chown -R 2000:0 /home/vllm && chmod -R g=u /home/vllm
# Python asks for the user's name; a user that a cluster chose has none in /etc/passwd.
ENV HOME=/home/vllm USER=vllm LOGNAME=vllm
WORKDIR /home/vllm
USER 2000:0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vtprune", "serve"]
