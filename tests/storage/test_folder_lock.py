"""One process a folder, until that process ends, however it ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from absl import logging

from aquant_jax.errors import InputError
from aquant_jax.storage.folder_lock import LOCK, hold
from tests.support.process import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from aquant_jax.storage.folder_lock import hold
with hold(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def nothing():
    pass


def test_the_second_process_is_told_who_holds_it_until_that_one_is_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=f"run is in use by process {process.pid} on "),
            hold(folder, nothing),
        ):
            pass
        process.send_signal(signal.SIGKILL)
    assert (folder / LOCK).exists()
    with hold(folder, nothing):
        assert f"process {os.getpid()} on " in (folder / LOCK).read_text()
    assert not (folder / LOCK).exists()


def test_of_many_threads_one_holds_it_at_a_time(tmp_path):
    inside, most, refused = [], [], []

    def work():
        for _ in range(200):
            try:
                with hold(tmp_path / "run", nothing):
                    inside.append(None)
                    most.append(len(inside))
                    inside.pop()
            except InputError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) + len(refused) == 800
    assert max(most) == 1
    assert all("is in use by" in message for message in refused)


def test_a_folder_that_vanishes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """`Path.mkdir` finds it, and it is gone when that asks what it is."""
    mkdir, failures = Path.mkdir, [FileExistsError(17, "File exists")] * 3

    def racing(path, *args, **kwargs):
        if failures:
            raise failures.pop()
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", racing)
    with hold(tmp_path / "run", nothing):
        assert (tmp_path / "run" / LOCK).exists()
    assert failures == []


def test_a_broken_link_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "folder")
    with (
        pytest.raises(InputError, match=r"link cannot be written: File exists"),
        hold(tmp_path / "link", nothing),
    ):
        pass


def test_folders_that_stay_empty_are_removed_again(tmp_path):
    with hold(tmp_path / "a" / "b", nothing):
        pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b", nothing):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_name_that_is_too_long_leaves_no_parents(tmp_path):
    with (
        pytest.raises(InputError, match="cannot be written: File name too long"),
        hold(tmp_path / "a" / ("b" * 300), nothing),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_checked_before_it_is_touched(tmp_path):
    def refuse():
        raise InputError("not yours")

    with pytest.raises(InputError, match="not yours"), hold(tmp_path / "run", refuse):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="cannot be written"), hold(tmp_path, nothing):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    warnings = []
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging, "warning", lambda text, *of: warnings.append(text % of))
    with hold(tmp_path, nothing):
        pass
    assert warnings == [
        f"{tmp_path}: its file system has no locks (No locks available); let no other process use "
        "this folder"
    ]
