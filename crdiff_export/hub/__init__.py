"""The Hugging Face Hub; the only package that may open a socket. Tokens are left to huggingface_hub, unseen."""

from crdiff_export.hub.download import fetch, fetch_parts, hashes, without_others
from crdiff_export.hub.remote_headers import look

__all__ = ["fetch", "fetch_parts", "hashes", "look", "without_others"]
