"""Writes report.html of a finished run of quantize, sweep or allocate, from its workdir.

The first two write it themselves; this one writes it again, elsewhere, or with another run beside
it: with an allocation and runs made of it, what was predicted and what was measured. The page is
one file without references: layers, borders, errors, histograms, the command.

Example:

    python -m launch.report --workdir=runs/aquant --against=runs/qdrop --output=compared.html
"""

import sys
from pathlib import Path

from absl import flags

from aquant_jax.errors import InputError
from launch.lib import command_line, reports

COMPARISON = "report_against.html"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    command_line.define_path(values, "workdir", None, "folder of a finished run; required")
    command_line.define_path(values, "against", None, "folder of another, shown beside it")
    text = f"file to write; report.html in the workdir, or {COMPARISON} with --against"
    command_line.define_path(values, "output", None, text)
    flags.mark_flags_as_required(["workdir"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Writes one report."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    path = Path(values.workdir)
    against, output = (None if v is None else Path(v) for v in (values.against, values.output))
    if against is not None and against.resolve() == path.resolve():
        raise InputError(f"--against={against} is the workdir itself")
    if against is not None and output is None:
        output = path / COMPARISON
    file = reports.write_report(path, output, against)
    print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
