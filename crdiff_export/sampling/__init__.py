"""Run models: open a base as a diffusers pipeline, sample it with POA, and serve ComfyUI's nodes.

Begin with `drawing_setup`, which decides everything before torch is imported: the base, how diffusers opens it
(`pipelines`), the device and the dtype. `session` then opens the pipeline and draws. `poa/` mixes the predictions of
the dense and the pruned model, `comfyui/` does the same in ComfyUI.
"""

# Modules, which other rooms import by their names; ComfyUI loads none but its own.
__all__ = [
    "comfyui", "drawing_setup", "fingerprint", "pipelines", "poa", "prompts", "quiet", "request_checks", "session",
]  # fmt: skip
