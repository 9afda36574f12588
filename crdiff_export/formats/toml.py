"""Parse TOML, also in web UIs that run Python 3.10, which has no parser of its own but one in its pip."""

import importlib
from typing import Any


def parse(text: str) -> dict[str, Any]:
    """Parse a document.

    Args:
        text: The document.

    Returns:
        Its values.

    Raises:
        ValueError: The text is no TOML.
        RecursionError: Its values are nested too deeply.
    """
    try:
        parser = importlib.import_module("tomllib")
    except ModuleNotFoundError:
        parser = importlib.import_module("pip._vendor.tomli")
    values: dict[str, Any] = parser.loads(text)
    return values
