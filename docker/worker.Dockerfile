# The worker and the embedded engine. Build one of two targets from the repository's root:
#   docker build --file docker/worker.Dockerfile --target worker-cpu  --tag perennial/worker-cpu:0.1.0 .
#   docker build --file docker/worker.Dockerfile --target worker-cuda --tag perennial/worker-cuda:0.1.0 .
# CUDA's libraries come with torch's wheel, the driver from the host: the base image is the same.
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/perennial
WORKDIR /src
COPY constraints.txt .

# torch before our code: its layer of gigabytes stays when the code changes.
FROM build AS build-cpu
RUN pip --python /opt/perennial/bin/python install --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'
COPY . .
RUN pip --python /opt/perennial/bin/python install --constraint constraints.txt '.[worker]'

FROM build AS build-cuda
RUN pip --python /opt/perennial/bin/python install --constraint constraints.txt 'torch==2.13.0'
COPY . .
RUN pip --python /opt/perennial/bin/python install --constraint constraints.txt '.[worker,cuda]'

FROM python:3.11.14-slim-bookworm AS runtime
RUN groupadd --gid 10001 perennial \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin perennial \
    && install --directory --owner perennial --group perennial --mode 0700 /adapters \
    && python -m pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel
# TOKENIZERS_PARALLELISM is no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/perennial/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    USER=perennial \
    PERENNIAL_WORKER_ADAPTERS_ROOT=/adapters
USER 10001:10001
# A worker is well when the service has heard of one lately. The engine has a check of its own in compose.yaml.
HEALTHCHECK --interval=15s --timeout=6s --start-period=10m --retries=4 \
    CMD ["sh", "-c", "exec perennial health \"${PERENNIAL_WORKER_SERVICE_URL}/readyz\" --part worker"]
ENTRYPOINT ["perennial"]
CMD ["worker"]

FROM runtime AS worker-cpu
COPY --from=build-cpu /opt/perennial /opt/perennial

FROM runtime AS worker-cuda
USER 0:0
# Triton builds its own link to the driver with it, when it first runs a kernel.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-cuda /opt/perennial /opt/perennial
