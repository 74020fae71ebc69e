import numpy as np
import pytest

from tests.golden import regenerate as golden
from tests.support import numpy_reference as reference

FOLDER = golden.FOLDER
RESULTS = ("input_codes", "nearest_codes", "hard_codes", "output")


def load(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", golden.CASES)
def test_results_are_those_on_file(name):
    stored = load(name)
    given = {key: value for key, value in stored.items() if key not in RESULTS}
    found = golden.compute(name, given)
    for key in RESULTS:
        assert found[key].dtype == stored[key].dtype
        np.testing.assert_array_equal(found[key], stored[key])


@pytest.mark.parametrize("name", golden.CASES)
def test_files_agree_with_the_numpy_reference(name):
    """So that regenerating cannot bless a bug."""
    size, strides, padding, groups, border, phi, granularity = golden.CASES[name]
    stored = load(name)
    coefficients = {key: stored[key] for key in golden.POWERS[border]} or None
    expected, codes = reference.quantized_conv(
        stored["x"], stored["kernel"], stored["bias"], np.float32(golden.STEP), golden.ZERO,
        golden.BITS, coefficients, phi, granularity, strides, padding, groups=groups,
    )  # fmt: skip
    np.testing.assert_array_equal(stored["output"], expected)
    found = stored["input_codes"]
    if border is None or granularity == "channel":
        shifted = reference.im2col(found.astype(int) - 2, size, strides, padding)
        found = np.moveaxis(shifted + 2, 3, 0)
    np.testing.assert_array_equal(np.moveaxis(found, 0, 3), codes)


@pytest.mark.parametrize("name", golden.CASES)
def test_the_regenerator_makes_the_inputs_on_file(name):
    stored = load(name)
    for key, value in golden.inputs(name, list(golden.CASES).index(name)).items():
        np.testing.assert_array_equal(value, stored[key])
