"""``launch.release``: what stops a release, and what archives must hold."""

import subprocess
import sys
import tarfile
import zipfile

import pytest

from aquant_jax.errors import InputError
from launch import release
from launch.lib import release_checks as checks
from tests.support.process import REPOSITORY

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-29\n\n### Added\n\n- A demo.\n"


@pytest.fixture
def checkout(tmp_path):
    """What a release reads of a checkout, all committed."""
    files = {
        "aquant_jax/__init__.py": '__version__ = "0.2.0"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.2.0\n",
        "CHANGELOG.md": CHANGELOG,
        "README.md": "```python\nprint(1)\n```\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    commit(tmp_path)
    return tmp_path


def commit(path):
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    for command in (["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", *author, *command], cwd=path, check=True)


def check_all(checkout, version="0.2.0"):
    checks.check_versions(checkout, version)
    checks.check_changelog(checkout, version)
    checks.check_tree(checkout, version)


def test_a_checkout_that_is_ready_passes(checkout):
    check_all(checkout)
    assert checks.first_example(checkout / "README.md") == "print(1)\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("aquant_jax/__init__.py", '__version__ = "0.1.0"\n', "has 0.1.0, but the release is 0.2"),
        ("CITATION.cff", "cff-version: 1.2.0\n", "CITATION.cff has no version, but"),
        ("CHANGELOG.md", CHANGELOG.replace("0.2.0", "0.3.0"), "begins with 0.3.0, but"),
        ("CHANGELOG.md", CHANGELOG.replace(" - 2026-11-29", ""), r"no date after \[0.2.0\]"),
        ("CHANGELOG.md", CHANGELOG.replace("- A demo.", "- B\n").split("###")[0], "no entries"),
        ("CHANGELOG.md", CHANGELOG.replace("d]\n", "d]\n\n- More.\n"), "under Unreleased"),
        ("README.md", "changed", "not committed: README.md"),
    ],
)
def test_what_stops_a_release(checkout, name, text, message):
    (checkout / name).write_text(text)
    with pytest.raises(InputError, match=message):
        check_all(checkout)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tag", "v0.2.0"], "the tag v0.2.0 exists already"),
        (["mv", "README.md", "READ.md"], "READ.md"),
    ],
)
def test_what_git_knows_stops_a_release(checkout, command, message):
    subprocess.run(["git", *command], cwd=checkout, check=True)
    with pytest.raises(InputError, match=message):
        check_all(checkout)


def test_the_address_must_be_known(checkout):
    (checkout / "docs.md").write_text(f"{checks.ADDRESS}aquant-jax")
    commit(checkout)
    with pytest.raises(InputError, match=r"in 1 files, such as docs.md; replace OWNER first"):
        checks.check_tree(checkout, "0.2.0")


def wheel(path, *more, without=""):
    names = [*checks.IN_WHEEL, "gpu_ops/_cpu.abi.so", "aquant_jax-0.2.0.dist-info/WHEEL", *more]
    with zipfile.ZipFile(path / "a.whl", "w") as archive:
        for name in names:
            if name != without:
                archive.writestr(name, "")
    return path / "a.whl"


def test_a_wheel_that_is_whole(tmp_path):
    checks.check_wheel(wheel(tmp_path))


@pytest.mark.parametrize(
    ("more", "without", "message"),
    [
        ((), "aquant_jax/data/digits.npz", "a.whl lacks aquant_jax/data/digits.npz"),
        ((), "gpu_ops/_cpu.abi.so", r"compiled modules \[\], not gpu_ops/_cpu alone"),
        (("gpu_ops/_cuda.abi.so",), "", "not gpu_ops/_cpu alone"),
        (("gpu_ops/bindings.cc",), "", "gpu_ops/bindings.cc, a source"),
        (("launch/quantize.py",), "", "launch/quantize.py, which belongs to no package"),
        (("aquant_jax/__pycache__/a.pyc",), "", "__pycache__/a.pyc"),
    ],
)
def test_a_wheel_with_too_little_or_too_much(tmp_path, more, without, message):
    with pytest.raises(InputError, match=message):
        checks.check_wheel(wheel(tmp_path, *more, without=without))


def test_a_source_distribution(tmp_path):
    path = tmp_path / "a.tar.gz"
    for missing in ("", "gpu_ops/bindings.cc"):
        with tarfile.open(path, "w:gz") as archive:
            for name in checks.IN_SDIST:
                if name != missing:
                    archive.addfile(tarfile.TarInfo(f"aquant_jax-0.2.0/{name}"))
        if not missing:
            checks.check_sdist(path)
    with pytest.raises(InputError, match=r"a.tar.gz lacks gpu_ops/bindings.cc"):
        checks.check_sdist(path)
    path.write_bytes(path.read_bytes()[:50])  # as of a build that was killed
    for check in (checks.check_sdist, checks.check_wheel):
        with pytest.raises(InputError, match=r"a.tar.gz is malformed: "):
            check(path)


def test_needed_files_are_in_the_repository():
    assert [name for name in checks.IN_SDIST if not (REPOSITORY / name).exists()] == []


def test_a_wrong_version_and_python_are_one_line(capsys):
    assert release.main(["release", "--version=9.9.9"]) == 2
    message = "error: aquant_jax/__init__.py has 0.2.0, but the release is 9.9.9"
    assert capsys.readouterr().err.splitlines() == [message]
    assert release.main(["release", "--version=0.2.0", "--pythons=python2.0"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: --pythons: there is no python2.0"]


def test_an_environment_gets_the_wheel_of_its_python(tmp_path):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    names = [f"aquant_jax-0.2.0-{t}-{t}-manylinux_2_35_x86_64.whl" for t in ("cp39", tag)]
    assert release._wheel_for(sys.executable, [tmp_path / name for name in names]).name == names[1]
    with pytest.raises(InputError, match=f"has 0 wheels for {tag}, not one"):
        release._wheel_for(sys.executable, [tmp_path / names[0]])
