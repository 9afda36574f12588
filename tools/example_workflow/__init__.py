"""The example workflow for ComfyUI: `two_sizes` describes it, `graph` writes its JSON, `drawing` draws it."""
