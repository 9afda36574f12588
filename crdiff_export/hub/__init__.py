"""The Hugging Face Hub; the only package that may open a socket. Tokens are left to huggingface_hub, unseen."""

from crdiff_export.hub.download import fetch, hashes, without_others
from crdiff_export.hub.look import look

__all__ = ["fetch", "hashes", "look", "without_others"]
