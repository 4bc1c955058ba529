# dataflex-cli in an image, without root.
#
#   docker build -t dataflex .                          # a CPU: torch without CUDA
#   docker build -t dataflex --build-arg TORCH=cu130 .  # NVIDIA GPUs; torch brings its CUDA along
#   docker run --rm -v "$PWD/runs:/app/runs" dataflex train examples/train_lora/selectors/less.yaml
#
# On a GPU add `--gpus all` to `docker run`. BASE may be any Debian or Ubuntu with Python 3.11 to
# 3.13 in itself or in its packages, such as nvidia/cuda:13.0.2-base-ubuntu24.04. TORCH is a folder of
# download.pytorch.org/whl, or `pypi` where that host cannot be reached: then PyPI alone, with CUDA.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
ARG TORCH=cpu
ARG UV=0.13.9

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions of a distribution's own packages are the base image's business.
# hadolint ignore=DL3008
RUN if ! python3 -c "import ensurepip" 2>/dev/null; then \
      apt-get update \
      && apt-get install -y --no-install-recommends python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && useradd --create-home --uid 10001 dataflex \
    && install -d -o dataflex /app /app/runs /opt/dataflex

USER 10001
WORKDIR /app
COPY --chown=dataflex pyproject.toml README.md LICENSE source/
COPY --chown=dataflex dataflex source/dataflex/
COPY --chown=dataflex gradstore source/gradstore/
COPY --chown=dataflex kernels source/kernels/
COPY --chown=dataflex examples examples/

# faiss-gpu needs 1.2 GB of CUDA 12 beside torch's CUDA 13; on a CPU faiss-cpu does the same.
WORKDIR /app/source
RUN python3 -m venv /tmp/uv \
    && /tmp/uv/bin/pip install --no-cache-dir "uv==${UV}" \
    && python3 -m venv --without-pip /opt/dataflex \
    && touch /tmp/overrides.txt \
    && case "${TORCH}" in \
         cpu) printf 'faiss-gpu; sys_platform == "never"\nfaiss-cpu\n' >/tmp/overrides.txt \
              && backend=(--torch-backend cpu) ;; \
         pypi) backend=() ;; \
         *) backend=(--torch-backend "${TORCH}") ;; \
       esac \
    && /tmp/uv/bin/uv pip install --no-cache --python /opt/dataflex/bin/python \
         --overrides /tmp/overrides.txt "${backend[@]}" . \
    && rm -rf /tmp/uv /tmp/overrides.txt /app/source

ENV PATH=/opt/dataflex/bin:$PATH
WORKDIR /app
ENTRYPOINT ["dataflex-cli"]
CMD ["--help"]
