"""Options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from crdiff_export.errors import CrdiffError
from crdiff_export.recipe import Size

Command = TypeVar("Command", bound=Callable[..., Any])


class SizeType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.5 on
    """`N` or `WxH` in pixels."""

    name = "size"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """How --help calls it."""
        return "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """A Size; a usage error for any other text."""
        if isinstance(value, Size):
            return value
        try:
            return Size.parse(value)
        except CrdiffError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


def output_options(command: Command) -> Command:
    """--json and -q."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)
    return click.option("-q", "--quiet", is_flag=True, help="Only the result; no progress, no notes.")(command)


device_option = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N|mps",
    help="Where weights are counted and zeroed. The result does not depend on it.",
)  # fmt: skip
