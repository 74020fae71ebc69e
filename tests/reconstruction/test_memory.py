"""The memory that is free is what the machine and the limits of the process leave."""

import sys

import psutil
import pytest

from aquant_jax.reconstruction.memory import free_bytes
from tests.support.process import run_python

LIMITED = """
import resource
import psutil
from aquant_jax.reconstruction.memory import free_bytes
before = free_bytes()
limit = psutil.Process().memory_info().vms + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
print(before, free_bytes())
"""


def test_no_more_than_the_machine_has():
    assert 0 < free_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limited address space")
def test_a_limit_of_the_address_space_counts():
    done = run_python(LIMITED)
    assert done.returncode == 0, done.stderr[-2000:]
    before, limited = map(int, done.stdout.split())
    assert limited < before
    assert 2**27 < limited <= 2**28
