"""``--memory_limit``."""

import pytest

from aquant_jax.errors import InputError
from launch.lib.memory_limits import parse


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("4GiB", 2**32), ("1.5 MiB", 3 * 2**19), ("500MB", 5 * 10**8), ("7", 7)],
)
def test_sizes(text, size):
    assert parse(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "4G", "-1GiB", "many", "4 GiB or so", "0.5", f"{10**400}GiB"]
)
def test_no_size(text):
    with pytest.raises(InputError, match=r"--memory_limit=.*: it must be a size, such as 4GiB"):
        parse(text)
