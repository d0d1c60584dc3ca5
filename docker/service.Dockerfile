# The service: API, database, publisher. No torch. Build from the repository's root:
#   docker build --file docker/service.Dockerfile --tag perennial/service:0.1.0 .
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv --without-pip /opt/perennial
WORKDIR /src
COPY . .
# The image is wrong if training libraries came along.
RUN pip --python /opt/perennial/bin/python install --constraint constraints.txt '.[postgres]' \
    && /opt/perennial/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"

FROM python:3.11.14-slim-bookworm AS service
# Volumes take over the owner of the directory that they are mounted on.
RUN groupadd --gid 10001 perennial \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin perennial \
    && install --directory --owner perennial --group perennial --mode 0700 /data /adapters /worker-key \
    && python -m pip uninstall --yes --quiet --root-user-action ignore pip setuptools wheel
COPY --from=build /opt/perennial /opt/perennial
ENV PATH=/opt/perennial/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PERENNIAL_DATA_DIR=/data \
    PERENNIAL_ADAPTERS_DIR=/adapters \
    PERENNIAL_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8700
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s --retries=3 \
    CMD ["perennial", "health", "http://127.0.0.1:8700/healthz"]
ENTRYPOINT ["perennial"]
CMD ["serve"]
