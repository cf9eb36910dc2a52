# The image that GPU runs use: NVIDIA's NeMo container and this repository. Build: docker build -t nemo-prune-distill .
# 25.11 holds NeMo 2.6.0, megatron-core 0.15, ModelOpt 0.37.0 and Transformer Engine: the container nearest to the
# versions in requirements/cpu.lock, and `make test-nemo26` runs the integration tests with the image's versions. 26.02
# (megatron-core 0.16) is the last with NeMo 2.x; later ones have none.
ARG BASE_IMAGE=nvcr.io/nvidia/nemo:25.11
FROM ${BASE_IMAGE}

WORKDIR /opt/nemo-prune-distill
# First what seldom changes, so that a change of the code builds in seconds. The container's own torch, NeMo and
# Megatron-Core stay as they are. ModelOpt is raised, for the pruning of experts: by itself, as 0.40 and the container's
# 0.37 need the same libraries, and both are Python alone.
COPY requirements/container.in requirements/nemo26.in requirements/
RUN pip install --no-cache-dir --requirement requirements/container.in \
 && pip install --no-cache-dir --no-deps "$(grep '^nvidia-modelopt==' requirements/nemo26.in)"
COPY . .
# Readable to any user, as the container may be run as one (docker run --user, pyxis).
RUN pip install --no-cache-dir --no-deps --editable . \
 && chmod -R a+rX . \
 && python -c "import nemo, megatron.core, modelopt, transformer_engine, prune_distill.config.load, launch.run" \
 && python -c "import modelopt as found; assert found.__version__ == '$(sed -n s/^nvidia-modelopt==//p requirements/nemo26.in)', found"

CMD ["python", "-m", "launch.run", "--help"]
