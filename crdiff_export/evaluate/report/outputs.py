"""The files of a report: checked before anything is drawn, then written all or none."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from crdiff_export.bake import destination, staging
from crdiff_export.errors import OptionError

# What makes the content of a file, by the file's suffix in lower case.
Makers = Mapping[str, Callable[[], str | bytes]]


def check(paths: Sequence[Path], suffixes: Sequence[str], what: str, *, force: bool) -> tuple[Path, ...]:
    """Check that files may and can be written.

    Args:
        paths: The files.
        suffixes: The suffixes that are allowed, with a dot, in lower case.
        what: Words for an error about another suffix, such as "neither a PNG nor an HTML file".
        force: Whether files that exist may be replaced.

    Returns:
        Each file once.

    Raises:
        OptionError: A name has another ending.
        PlanError: Its folder or what stands there now does not allow it.
    """
    once = tuple(dict.fromkeys(paths))
    for path in once:
        if path.suffix.lower() not in suffixes:
            name = path.name or "report"
            *names, last = [f"{name}{suffix}" for suffix in suffixes]
            raise OptionError(f"{path}: {what}", f"Name it {', '.join(names)} or {last}.")
        destination.check_file(path, force=force)
    return once


def write(paths: Sequence[Path], makers: Makers, *, replace: bool) -> None:
    """Write every file beside its final name, then rename all of them.

    Args:
        paths: The files, as `check` returned them.
        makers: The function that makes a file's content, for each suffix among `paths`.
        replace: Whether files that exist are replaced.

    Raises:
        BakeError: A file could not be written; none of them has its name then.
    """
    with ExitStack() as stack:
        parts: list[Path] = []
        for path in paths:
            try:
                part = stack.enter_context(staging.temp_sibling(path, folder=False))
                content = makers[path.suffix.lower()]()
                part.write_bytes(content if isinstance(content, bytes) else content.encode())
            except OSError as error:
                raise staging.as_bake_error(error, path) from error
            parts.append(part)
        for part, path in zip(parts, paths, strict=True):
            try:
                staging.copy_permissions(part, path)
                staging.publish(part, path, replace=replace)
            except OSError as error:
                raise staging.as_bake_error(error, path) from error
