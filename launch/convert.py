"""Converts a public checkpoint to a safetensors file, which can be read without PyTorch.

--from is a PyTorch checkpoint (.pth, .pth.tar, .pt, .bin; only tensors are read, no code is run) or
a safetensors file, with the names of the BRECQ and QDrop releases, torchvision or timm. --to holds
the arrays under the names and in the layout of our own variables (HWIO), for ``config.weights`` and
``models.create(name, weights=FILE)``.

Example:

    python -m launch.convert --model=resnet18 --from=resnet18.pth.tar --to=resnet18.safetensors
"""

import sys
from pathlib import Path

import jax
from absl import flags

from aquant_jax import models
from aquant_jax.errors import InputError
from aquant_jax.models import importers
from aquant_jax.plan.checks import check_variables
from launch.lib import command_line


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("model", None, "name in the zoo; required", flag_values=values)
    command_line.define_path(values, "from", None, "checkpoint to read; required")
    command_line.define_path(values, "to", None, "safetensors file to write; required")
    flags.mark_flags_as_required(["model", "from", "to"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Reads, checks and writes; an existing file is never overwritten."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    target = Path(values.to)
    if target.suffix != ".safetensors":
        raise InputError(f"--to={target} must end in .safetensors")
    _, variables = models.create(values.model, values["from"].value)
    try:
        check_variables(variables)
    except InputError as error:
        raise InputError(f"{values['from'].value}: {error}") from error
    content = importers.serialize(variables)
    if not target.exists():
        importers.write(target, content)
    elif not target.is_file() or target.read_bytes() != content:
        raise InputError(f"{target} exists and holds something else; remove it or choose another")
    arrays = jax.tree.leaves(variables)
    print(f"{values.model}: {len(arrays)} arrays, {sum(a.size for a in arrays):,} values")
    print(f"in {target}")


if __name__ == "__main__":
    sys.exit(main())
