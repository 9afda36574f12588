"""Run models: open a base as a diffusers pipeline, sample it with POA, and serve ComfyUI and web UIs.

Begin with `drawing_setup`, which decides everything before torch is imported: the base, how diffusers opens it
(`pipelines`), the device and the dtype. `session` then opens the pipeline and draws. `poa/` mixes the predictions of
the dense and the pruned model, `comfyui/` and `webui/` do the same in ComfyUI and in the web UIs.
"""

# Modules, which other rooms import by their names; ComfyUI and the web UIs load none but their own.
__all__ = [
    "comfyui", "drawing_setup", "fingerprint", "pipelines", "poa", "prompts", "quiet", "request_checks", "session",
    "webui",
]  # fmt: skip
