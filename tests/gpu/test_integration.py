"""The integration tests on a CUDA machine with the real Transformer Engine (`make test-gpu`)."""

from tests.integration.test_conversion import *  # noqa: F403
from tests.integration.test_distillation import *  # noqa: F403
from tests.integration.test_layouts import *  # noqa: F403
from tests.integration.test_pipeline import *  # noqa: F403
from tests.integration.test_pruning import *  # noqa: F403
