"""Models that run: diffusers pipelines, POA, and the ComfyUI nodes."""
