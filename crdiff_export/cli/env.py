"""`crdiff env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from crdiff_export.cli.blocks import Facts
from crdiff_export.cli.command import command
from crdiff_export.cli.output import Output, Result

# What an answer to a bug report depends on.
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "huggingface_hub", "numpy", "numba", "click", "rich")
EXTRAS = ("score", "search", "fid")


@command(
    "crdiff env", "crdiff env --json > env.json", short_help="Show versions, devices and folders, for bug reports."
)
def env(_out: Output) -> Result:
    """Show the versions of crdiff and of what it uses, the devices, the extras and the folders.

    No token and no address of a server is shown.
    """
    from crdiff_export.bake.metadata import tool_version
    from crdiff_export.formats import hash_cache
    from crdiff_export.hub.download import cache_folder
    from crdiff_export.prune import kernels

    packages = {name: found for name in PACKAGES if (found := _version(name))}
    missing = {extra: _missing(extra) for extra in EXTRAS}
    devices, package = kernels.devices(), str(Path(__file__).parents[1])
    hub_cache, hashes = cache_folder(), hash_cache.folder()
    variables = sorted(name for name in os.environ if name.startswith(("CRDIFF_", "HF_")))
    record = {
        "crdiff": tool_version(), "package": package, "python": platform.python_version(),
        "system": platform.platform(), "cores": kernels.cores(), "packages": packages, "devices": devices,
        "extras": {extra: not names for extra, names in missing.items()}, "hub_cache": hub_cache,
        "hash_cache": str(hashes) if hashes else None,
        "variables": variables,
    }  # fmt: skip
    facts = {
        "crdiff": f"{tool_version()} in {package}",
        "Python": f"{platform.python_version()} on {platform.platform()}, {kernels.cores()} cores",
        **packages,
        "devices": "; ".join(devices),
        **{
            f"extra [{extra}]": f"lacks {', '.join(names)}" if names else "installed"
            for extra, names in missing.items()
        },
        "Hub's cache": hub_cache,
        "cache of hashes": str(hashes) if hashes else "none on this system",
        "variables": ", ".join(variables) or "none",
    }
    return Result(record, [Facts(facts)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in requires("crdiff-export") or ()]
    except PackageNotFoundError:
        return []
    needed = [
        r for r in listed if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]
    return sorted(requirement.name for requirement in needed if _version(requirement.name) is None)
