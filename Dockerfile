# Two stages: the first installs, the second only runs. Settings and secrets come from the environment, never from here.
FROM python:3.13.12-slim-trixie@sha256:f1927c75e81efd1e091dbd64b6c0ecaa5630b38635a3d1c04034ac636e1f94c8 AS build
RUN python -m venv --without-pip /venv
COPY gateway/requirements.txt /requirements.txt
# Wheels alone, each with a pinned hash: nothing is compiled and no package's code runs here.
RUN python -m pip --python /venv/bin/python install --disable-pip-version-check --no-cache-dir --no-compile \
    --only-binary :all: --require-hashes --no-deps --requirement /requirements.txt
COPY gateway /app/gateway
COPY sql /app/sql
# Nothing can be written at run time, so the bytecode is made now.
RUN python -m compileall -q -j 0 --invalidation-mode unchecked-hash /venv/lib /app/gateway

FROM python:3.13.12-slim-trixie@sha256:f1927c75e81efd1e091dbd64b6c0ecaa5630b38635a3d1c04034ac636e1f94c8
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "gateway", "health"]
CMD ["python", "-m", "gateway", "serve"]
