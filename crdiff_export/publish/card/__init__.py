"""The model card of a Hub repository that holds pruned variants: text in, text out, without files or network."""

from crdiff_export.publish.card.model import BaseModel, Card, Origin, Row
from crdiff_export.publish.card.render import render

__all__ = ["BaseModel", "Card", "Origin", "Row", "render"]
