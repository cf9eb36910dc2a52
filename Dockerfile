# The image that GPU runs use: NVIDIA's NeMo container and this repository. Build: docker build -t nemo-prune-distill .
# 25.11 holds NeMo 2.6.0, megatron-core 0.15, ModelOpt 0.37.0 and Transformer Engine: the container nearest to the
# versions in requirements/cpu.lock. 26.02 (megatron-core 0.16) is the last with NeMo 2.x; later ones have none.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

WORKDIR /opt/nemo-prune-distill
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY convert convert
COPY launch launch
COPY recipes recipes
COPY tests tests
# The container's own torch, NeMo, Megatron-Core and ModelOpt stay as they are; only what it lacks is added.
RUN pip install --no-cache-dir --no-deps -e . \
 && pip install --no-cache-dir "hydra-core>=1.3" "omegaconf>=2.3" jinja2 matplotlib filelock pytest pytest-timeout \
 && python -c "import nemo, megatron.core, modelopt, transformer_engine, conf.load, launch.run"

CMD ["python", "-m", "launch.run", "--help"]
