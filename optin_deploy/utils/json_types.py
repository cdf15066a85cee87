"""Types of parsed JSON; readers check what they take from it."""

from collections.abc import Mapping
from typing import Any

JsonValue = Any
JsonObject = Mapping[str, JsonValue]
