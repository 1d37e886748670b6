# The HTTP service with the model that ships:
#
#   docker build -t musiclm .
#   docker run --rm -p 8000:8000 musiclm
#   docker run --rm -p 8000:8000 -v "$PWD/my-model:/model:ro" musiclm --model /model --max-requests 16
#
# pip takes torch from its usual index, with CUDA's libraries: some 6 GB. For a CPU, give the index of torch's CPU builds
# as well: --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.12-slim AS build
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
RUN python -m venv /venv
# what setup.py reads, and the stand-in for fairseq that it names as a requirement
COPY setup.py pyproject.toml MANIFEST.in LICENSE README.md CHANGELOG.md constraints.txt ./
COPY compat compat
COPY musiclm_pytorch musiclm_pytorch
RUN /venv/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.12-slim
COPY --from=build /venv /venv
RUN useradd --create-home --uid 1000 musiclm
USER musiclm
WORKDIR /srv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["musiclm", "serve", "--host", "0.0.0.0", "--port", "8000"]
