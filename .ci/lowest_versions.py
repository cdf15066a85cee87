"""Print pip's requirements for the lowest version of every dependency, torch apart: each machine has its own build."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
requirements = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
pattern = re.compile(r"([\w.-]+)>=([\w.]+)")
pairs = [match.groups() for match in map(pattern.match, requirements) if match is not None]
print(*(f"{name}=={version}" for name, version in pairs if name != "torch"))
