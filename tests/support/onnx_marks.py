"""Marks of test files that convert networks to ONNX."""

import pytest

IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:RuntimeWarning"),  # OpenVINO's telemetry
]
