"""Write the model card of a Hub repository with pruned variants: text in, text out, without files or network.

Begin with `render`, which makes a new card or updates one, from a `Card` with its `CardVariant`s, `CardPack`s and
`BaseModel`s.
"""

from crdiff_export.publish.card.model import BaseModel, Card, CardPack, CardVariant
from crdiff_export.publish.card.render import render

__all__ = ["BaseModel", "Card", "CardPack", "CardVariant", "render"]
