"""The memory that is free is what the machine and the limits of the process leave."""

import resource

import psutil

from aquant_jax.reconstruction.memory import free_bytes


def test_no_more_than_the_machine_has():
    assert 0 < free_bytes() <= psutil.virtual_memory().total


def test_a_limit_of_the_address_space_counts(monkeypatch):
    """The limit is only reported: threads of XLA that start under a real one end the process."""
    before = free_bytes()
    limit = psutil.Process().memory_info().vms + 2**28
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, resource.RLIM_INFINITY))
    limited = free_bytes()
    assert limited < before
    assert 2**27 < limited <= 2**28
