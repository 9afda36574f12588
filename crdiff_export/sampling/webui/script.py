"""The accordion of CR-Diff in txt2img and img2img, its infotext and its axes of the XYZ plot.

The UIs call a script's methods in the order of a picture: `before_process`, then `process_before_every_sampling` for
each pass of each batch, then `postprocess`. SD.Next has no hook for a pass; it calls `process`.
"""

import logging
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from crdiff_export.errors import CrdiffError
from crdiff_export.models.recipe import MAX_POA_WEIGHT
from crdiff_export.sampling.webui import listing, ui
from crdiff_export.sampling.webui.settings import FILE, START, STOP, WEIGHT, Settings
from crdiff_export.sampling.webui.source import Applied, PoaFile

TITLE = "CR-Diff"
NONE = "None"
# The attribute of a processing object with what the XYZ plot changes for a cell.
CHANGES = "crdiff_changes"
# The label of an axis of the XYZ plot, by the field of the settings.
AXES = {field: f"[{TITLE}] {field}" for field in ("file", "weight", "start", "stop")}
_log = logging.getLogger(__name__)


class Accordion:
    """What the script does, apart from being the UI's kind of script.

    Args:
        adapter: The name of the module that applies POA in this UI.
    """

    def __init__(self, adapter: str) -> None:
        self._adapter = adapter
        self._applied: Applied | None = None

    @property
    def has_passes(self) -> bool:
        """Whether the UI calls a hook for each pass of a picture."""
        return self._adapter != "sdnext"

    def components(self) -> tuple[list[Any], list[tuple[Any, Any]]]:
        """Make the components of the accordion.

        Returns:
            The components in the order of `settings`, and each with how its value is read from an infotext.

        """
        import gradio as gr

        def choices() -> list[str]:
            return [NONE, *listing.files()]

        with gr.Accordion(TITLE, open=False):
            with gr.Row():
                file = gr.Dropdown(choices(), value=NONE, label="Baked file or pack, made from the loaded checkpoint")
                refresh = gr.Button("Refresh")
            recommended = gr.Checkbox(True, label="Take the weight that the file recommends")
            weight = gr.Slider(
                0, MAX_POA_WEIGHT, 1.5, step=0.05, label="Weight: 0 is dense, 1 is pruned, more amplifies"
            )
            with gr.Row():
                start = gr.Slider(0, 1, 0, step=0.01, label="Start")
                stop = gr.Slider(0, 1, 1, step=0.01, label="Stop")
        refresh.click(lambda: gr.update(choices=choices()), inputs=[], outputs=[file])

        def listed(entries: dict[str, str]) -> str:
            name = entries.get(FILE, NONE)
            return name if name in choices() else NONE

        fields: list[tuple[Any, Any]] = [
            (file, listed),
            (recommended, lambda entries: WEIGHT not in entries),
            (weight, WEIGHT),
            (start, lambda entries: Settings.from_infotext(entries).start),
            (stop, lambda entries: Settings.from_infotext(entries).stop),
        ]
        return [file, recommended, weight, start, stop], fields

    def settings(self, p: Any, file: str, recommended: bool, weight: float, start: float, stop: float) -> Settings:
        """Make the settings of the components' values and of the cell of an XYZ plot.

        Args:
            p: The UI's processing object.
            file: The name of a file, or NONE.
            recommended: Whether to take the weight that the file recommends.
            weight: The weight otherwise.
            start: The fraction of sampling at which POA begins.
            stop: The fraction at which it ends.

        Returns:
            The settings.

        Raises:
            PoaError: A value of the plot is no number.

        """
        chosen = Settings("" if file in (NONE, None) else file, None if recommended else weight, start, stop)
        for field, text in getattr(p, CHANGES, {}).items():
            chosen = chosen.changed(field, text)
        return chosen

    def apply(self, p: Any, *values: Any) -> None:
        """Let the sampling that begins use POA; what cannot be used is said below the picture, which is then dense.

        Args:
            p: The UI's processing object.
            values: The values of the components.

        """
        self.remove()
        try:
            settings = self.settings(p, *values)
            if not settings.file:
                return
            source = _open(listing.path(settings.file))
            adapter = import_module(f"crdiff_export.sampling.webui.{self._adapter}")
            self._applied = adapter.apply(p, source, settings)
        except CrdiffError as error:
            _tell(p, f"CR-Diff is off: {error.message}. {error.hint}")
            return
        p.extra_generation_params.update(settings.infotext())
        if self._applied.note:
            _tell(p, f"CR-Diff: {self._applied.note}")

    def remove(self) -> None:
        """Take POA off the model if it is on."""
        if self._applied:
            self._applied.remove()
            self._applied = None


def script_class() -> Any:
    """Make the class that the UI looks for in an extension's script."""
    from modules import paths, script_callbacks, scripts

    adapter = ui.detect(Path(paths.script_path)).adapter

    class CrdiffScript(scripts.Script):  # type: ignore[misc]  # it has no types
        """CR-Diff's script: an accordion that is always there."""

        # After scripts that change the model in other ways.
        sorting_priority = 100

        def __init__(self) -> None:
            super().__init__()
            self._accordion = Accordion(adapter)

        def title(self) -> str:
            return TITLE

        def show(self, _is_img2img: bool) -> Any:
            return scripts.AlwaysVisible

        def ui(self, _is_img2img: bool) -> list[Any]:
            components, self.infotext_fields = self._accordion.components()
            self.paste_field_names = [FILE, WEIGHT, START, STOP]
            return components

        def before_process(self, p: Any, *values: Any) -> None:
            self._accordion.remove()  # an error has ended the picture before

        def process(self, p: Any, *values: Any) -> None:
            if not self._accordion.has_passes:
                self._accordion.apply(p, *values)

        def process_before_every_sampling(self, p: Any, *values: Any, **_: Any) -> None:
            self._accordion.apply(p, *values)

        def postprocess(self, p: Any, processed: Any, *values: Any) -> None:
            self._accordion.remove()

    script_callbacks.on_before_ui(add_axes)
    return CrdiffScript


def add_axes() -> None:
    """Add the axes to the UI's XYZ plot."""
    from modules import scripts

    modules = [data.module for data in scripts.scripts_data if hasattr(data.module, "axis_options")]
    for module in modules:
        labels = {option.label for option in module.axis_options}
        for field, label in AXES.items():
            if label not in labels:
                choices = {"choices": lambda: [NONE, *listing.files()]} if field == "file" else {}
                module.axis_options.append(module.AxisOption(label, str, _changer(field), **choices))


def _changer(field: str) -> Any:
    def change(p: Any, value: str, _values: Any) -> None:
        setattr(p, CHANGES, {**getattr(p, CHANGES, {}), field: value})

    return change


def _tell(p: Any, text: str) -> None:
    """Show one line in the page and below the picture."""
    import gradio as gr

    line = " ".join(text.split())
    _log.warning("%s", line)
    p.comment(line)
    gr.Warning(line)


def _open(path: Path) -> PoaFile:
    return _open_version(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _open_version(path: Path, changed: int) -> PoaFile:  # noqa: ARG001  a changed file is opened again
    return PoaFile.open(path)
