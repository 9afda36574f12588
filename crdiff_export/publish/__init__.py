"""The Hugging Face Hub, writing side: pushes, model cards and plan files.

Begin with `run.py` for a plan file, and with `request.py` for the push of one file. `card` writes the model card.
"""

from crdiff_export.publish.commit import PushResult, push
from crdiff_export.publish.request import (
    PushRequest,
    check_request,
    make_upload,
    path_in_repository,
    prepare,
    read_source_name,
)
from crdiff_export.publish.run import Outcome, TagResult, exit_code, publish, set_tags
from crdiff_export.publish.target import Destination
from crdiff_export.publish.upload import Upload
from crdiff_export.publish.worklist import PublishRequest, Worklist, make_worklist

__all__ = [
    "Destination", "Outcome", "PublishRequest", "PushRequest", "PushResult", "TagResult", "Upload", "Worklist",
    "check_request", "exit_code", "make_upload", "make_worklist", "path_in_repository", "prepare", "publish", "push",
    "read_source_name", "set_tags",
]  # fmt: skip
