"""What pyproject.toml says of the project."""

import tomllib

from tests.support.process import REPOSITORY

_project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
ADDRESS = _project["urls"]["Repository"]
