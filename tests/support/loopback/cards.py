"""What the Hub makes of the metadata at the head of a README.md."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def front_matter(text: str) -> dict[str, Any]:
    """The card's metadata; empty where there is none, or none that can be read."""
    try:
        card = _load(text)
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def _load(text: str) -> Any:
    match = _HEAD.match(text.removeprefix("\ufeff"))
    return yaml.safe_load(match[1]) if match else None


def card_errors(text: str) -> tuple[list[str], list[str]]:
    """What is wrong with a card's metadata, and what is merely not good."""
    try:
        card = _load(text)
    except yaml.YAMLError as error:
        return [f"invalid YAML in README.md: {error}"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return ["the metadata in README.md must be an object"], []
    errors = [f'"{name}" must be a string or a list of strings' for name in card if not _well_formed(name, card[name])]
    strange = [base for base in _list(card.get("base_model")) if not _REPO.fullmatch(str(base))]
    errors += [f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co.' for base in strange]
    if card.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    return errors, []


def _well_formed(name: str, value: Any) -> bool:
    if name in ("tags", "datasets", "metrics"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name in ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation"):
        return isinstance(value, str)
    return name != "base_model" or all(isinstance(item, str) for item in _list(value))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
