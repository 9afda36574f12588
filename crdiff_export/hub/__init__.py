"""The Hugging Face Hub, reading side: find bases, fetch them, read headers without fetching.

Begin with `bases.locate`. This room and `publish` are the only ones that talk to the Hub; tokens are left to
huggingface_hub and never read.
"""

from crdiff_export.hub.download import cached_hashes, fetch, fetch_parts

__all__ = ["cached_hashes", "fetch", "fetch_parts"]
