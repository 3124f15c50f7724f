# syntax=docker/dockerfile:1
# Two stages: wheels are made with a compiler at hand; a compiler stays, as kernels are built for the machine they run on.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY sagellm sagellm
RUN python -m venv /opt/sagellm \
    && /opt/sagellm/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu .

FROM python:3.11.13-slim-bookworm
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 --user-group sagellm
COPY --from=build /opt/sagellm /opt/sagellm
USER 10001:10001
WORKDIR /home/sagellm
ENV PATH=/opt/sagellm/bin:$PATH
EXPOSE 8901
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request; from sagellm.ports import SagePorts; port = SagePorts.load(os.environ).serve; urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=4)"]
ENTRYPOINT ["sagellm", "serve", "--host", "0.0.0.0"]
