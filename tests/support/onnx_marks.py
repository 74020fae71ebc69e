"""Marks of test files that convert networks to ONNX."""

from importlib.util import find_spec

import pytest

# Its import takes a second, which a worker that only collects these files does without.
NEEDS_JAX2ONNX = pytest.mark.skipif(find_spec("jax2onnx") is None, reason="needs aquant-jax[onnx]")
IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning"),  # OpenVINO's telemetry
]
