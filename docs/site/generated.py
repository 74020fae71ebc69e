"""Parts of pages, generated from the programs and the configs so that nothing is typed twice."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import flags
from mkdocs.exceptions import PluginError
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[2]
NO_CONFIGS = ("__init__", "variants", "imagenet", "glue")  # what several configs share
# Programs as a user meets them; others of launch/ follow. The last two are no user's.
FIRST = ("quantize", "evaluate", "export", "report", "sweep", "allocate")
OF_MAINTAINERS = ("release", "train_digits")


def programs() -> str:
    """What each program does, its flags and an example; those of users first."""
    found = sorted(path.stem for path in (ROOT / "launch").glob("*.py"))
    users = [*FIRST, *(name for name in found if name not in (*FIRST, *OF_MAINTAINERS))]
    benches = [f"bench.{path.stem}" for path in sorted((ROOT / "launch/bench").glob("*.py"))]
    groups = {"Programs": users, "Benchmarks": benches, "For maintainers": OF_MAINTAINERS}
    lines: list[str] = []
    for title, names in groups.items():
        lines += (f"## {title}", "", *(line for name in names for line in _program(name)))
    return "\n".join(lines)


def _program(name: str) -> Iterator[str]:
    """The section of one program; empty for a module that is none."""
    module = _imported(f"launch.{name}")
    if not hasattr(module, "main"):
        return
    values = flags.FlagValues()
    getattr(module, "define_flags", lambda _: None)(values)
    text, _, example = (module.__doc__ or "").partition("\nExample:")
    yield from (f"### launch.{name}", "", _escaped(inspect.cleandoc(text)), "")
    for flag in sorted(values, key=lambda flag: "required" not in values[flag].help):
        default = values[flag].default
        shown = "" if default in (None, "", []) else f" Default: `{_text(default)}`."
        yield f"- `--{flag}`: {_escaped(values[flag].help).rstrip('.')}.{shown}"
    if example:
        yield from ("", "```", *inspect.cleandoc(example).splitlines(), "```")
    yield ""


def configs() -> str:
    """The docstring of each config file, its variants, and the fields that flags set."""
    lines: list[str] = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem not in NO_CONFIGS:
            lines += _config(path)
    return "\n".join(lines)


def _config(path: Path) -> Iterator[str]:
    module = _imported(f"configs.{path.stem}")
    yield from (f"## {path.stem}", "")
    text = re.sub(r" {4,}(--\w)", r" \\\n    \1", (module.__doc__ or "").strip())
    yield from ("```text", *text.splitlines(), "```", "")
    yield from ("| part of the variant | values, the default first |", "| --- | --- |")
    for key, values in _choices(module).items():
        yield f"| {key} | {_codes(values)} |"
    yield from ("", "| field | default |", "| --- | --- |")
    for name, value in _fields(module.get_config()):
        yield f"| `--config.{name}` | `{_text(value)}` |"
    yield ""


def _choices(module: Any) -> dict[str, Sequence[str]]:
    """What each part of a config's variant may be, the default first."""
    variants = _imported("configs.variants")
    with mock.patch.object(variants, "parse", wraps=variants.parse) as parse:
        module.get_config()
    call = inspect.signature(variants.parse).bind(*parse.call_args.args)
    call.apply_defaults()
    bits = sorted(variants.BIT_WIDTHS, key=lambda bits: bits != call.arguments["default"])
    choices = parse.call_args.kwargs
    return {"bits": bits} | {f"`{key}=`": values for key, values in choices.items()}


def presets() -> str:
    """The fields in which the presets of a recipe differ."""
    import aquant_jax as aq
    from aquant_jax.recipe import PRESETS

    recipes = [aq.recipes.preset(name) for name in PRESETS]
    lines = [f"| field | {' | '.join(PRESETS)} |", f"|{' --- |' * (1 + len(recipes))}"]
    for parts in (recipes, [recipe.reconstruction for recipe in recipes]):
        for field in dataclasses.fields(parts[0]):
            values = [getattr(part, field.name) for part in parts]
            if field.name not in ("preset", "reconstruction") and len(set(values)) > 1:
                lines.append(f"| `{field.name}` | {' | '.join(map(str, values))} |")
    return "\n".join(lines)


def models() -> str:
    """The names of the networks."""
    return f"{_codes(_imported('aquant_jax.models').MODELS)}."


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a config without those of the recipe, which have a page of their own."""
    for name, value in config.items():
        if name != "recipe" and isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        elif name != "recipe":
            yield prefix + name, value


def supported() -> str:
    """What README.md says of features and limits."""
    readme = (ROOT / "README.md").read_text()
    lines = []
    for title in ("What is supported", "Limits"):
        found = re.search(rf"^## {title}\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
        if found is None:
            raise PluginError(f"reference/supported.md: README.md has no section {title!r}")
        text = re.sub(r"\]\((?!https?:|#)", "](../../", found[1])  # its links start at the root
        lines += [f"## {title}", text]
    return "\n".join(lines)


def _imported(name: str) -> Any:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, but for `` `code` ``."""
    return "`".join(
        part if i % 2 else part.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
        for i, part in enumerate(text.replace("``", "`").split("`"))
    )


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "~" if str(value) == str(Path.home()) else str(value)


# What stands for `<!-- site: NAME -->` in a page, on the site alone.
PARTS: dict[str, Callable[[], str]] = {
    "programs": programs,
    "configs": configs,
    "supported": supported,
    "presets": presets,
    "models": models,
}
