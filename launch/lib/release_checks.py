"""What must hold before a version is released: each check returns, or raises InputError."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from aquant_jax.errors import InputError
from aquant_jax.storage.parsing import malformed

ADDRESS = "https://github.com/OWNER/"  # stands in the files until the project has an address
IN_WHEEL = (
    "aquant_jax/__init__.py",
    "aquant_jax/demo.py",
    "aquant_jax/data/digits.npz",
    "aquant_jax/models/digits_cnn.safetensors",
    "aquant_jax/reporting/script.js",
    "aquant_jax/reporting/style.css",
    "aquant_jax/py.typed",
    "gpu_ops/__init__.py",
)
IN_SDIST = (
    *IN_WHEEL,
    *("CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "Makefile", "README.md"),
    *("configs/digits.py", "gpu_ops/CMakeLists.txt", "gpu_ops/bindings.cc", "pyproject.toml"),
    *("launch/quantize.py", "tests/conftest.py"),
)
NEVER = re.compile(r"(^|/)(runs|\.venv|__pycache__|build)/|\.(o|pyc)$")
SOURCES = re.compile(r"\.(cc|cu|h)$|CMakeLists\.txt$")


def check_versions(root: Path, version: str) -> None:
    """The package and CITATION.cff have the version."""
    for name, pattern in (
        ("aquant_jax/__init__.py", r'^__version__ = "(.*)"$'),
        ("CITATION.cff", r"^version: (.*)$"),
    ):
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        has = found[1] if found else "no version"
        if has != version:
            raise InputError(f"{name} has {has}, but the release is {version}")


def check_changelog(root: Path, version: str) -> None:
    """CHANGELOG.md has a dated section of the version, and nothing above it."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if sections and sections[0][0] == "Unreleased":
        if sections[0][2].strip():
            raise InputError(f"CHANGELOG.md has entries under Unreleased; move them to {version}")
        sections = sections[1:]
    first, date, entries = sections[0] if sections else ("nothing", "", "")
    if first != version:
        raise InputError(f"CHANGELOG.md begins with {first}, but the release is {version}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise InputError(f"CHANGELOG.md has no date after [{version}], such as 2026-11-29")
    if not entries.strip():
        raise InputError(f"CHANGELOG.md has no entries for {version}")


def check_tree(root: Path, version: str) -> None:
    """All is committed, the version has no tag yet, and files name the project's address."""
    if changed := _git(root, "status", "--porcelain"):
        name = changed[0].split()[-1]
        raise InputError(f"the checkout has changes that are not committed: {name}")
    if _git(root, "tag", "--list", f"v{version}"):
        raise InputError(f"the tag v{version} exists already")
    files = _git(root, "grep", "--files-with-matches", "--fixed-strings", ADDRESS)
    files = [name for name in files if not name.endswith("release_checks.py")]
    if files:
        raise InputError(
            f"{ADDRESS} stands for the project's address in {len(files)} files, such as"
            f" {files[0]}; replace OWNER first"
        )


def check_wheel(path: Path) -> None:
    """A wheel has both packages, their data and one compiled module, and no sources of it."""
    with malformed(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    _check_names(path.name, names, IN_WHEEL)
    metadata = re.compile(r"aquant_jax-[^/]+\.dist-info/")
    for name in names:
        if not (name.startswith(("aquant_jax/", "gpu_ops/")) or metadata.match(name)):
            raise InputError(f"{path.name} has {name}, which belongs to no package")
        if SOURCES.search(name):
            raise InputError(f"{path.name} has {name}, a source of the compiled module")
    compiled = [name for name in names if name.endswith(".so")]
    if len(compiled) != 1 or not compiled[0].startswith("gpu_ops/_cpu."):
        raise InputError(f"{path.name} has the compiled modules {compiled}, not gpu_ops/_cpu alone")


def check_sdist(path: Path) -> None:
    """A source distribution has what a build and the tests need."""
    with malformed(path), tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    _check_names(path.name, names, IN_SDIST)


def _check_names(archive: str, names: list[str], needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if name not in names]:
        raise InputError(f"{archive} lacks {missing[0]}")
    if wrong := [name for name in names if NEVER.search(name)]:
        raise InputError(f"{archive} has {wrong[0]}")


def first_example(page: Path) -> str:
    """The first Python code of a page: in README.md, the ten lines."""
    found = re.search(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    if not found:
        raise InputError(f"{page.name} has no Python example")
    return found[1]


def _git(root: Path, *arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode and done.stderr:
        raise InputError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.splitlines()
