# Two stages: the first installs, the second runs, as a user without rights, on a root file
# system that may be read-only; only /var/lib/lowbit is written. See docs/operations.md.

FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
WORKDIR /src
COPY requirements-uv.txt requirements.txt pyproject.toml hatch_build.py README.md ./
COPY client/python client/python
COPY service service
RUN python -m venv /opt/lowbit \
    && /opt/lowbit/bin/pip install --no-cache-dir --require-hashes -r requirements-uv.txt \
    && /opt/lowbit/bin/uv pip install --no-cache -p /opt/lowbit -c requirements.txt \
        "./client/python[cli]" .

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/lib/lowbit --create-home lowbit
COPY --from=build /opt/lowbit /opt/lowbit
ENV PATH=/opt/lowbit/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LOWBIT_HOME=/var/lib/lowbit \
    LOWBIT_LISTEN=0.0.0.0:50151
USER lowbit
VOLUME /var/lib/lowbit
EXPOSE 50151
HEALTHCHECK --start-period=30s CMD ["lowbit", "--address", "127.0.0.1:50151", "info"]
ENTRYPOINT ["lowbit-server"]
