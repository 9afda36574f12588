"""Pictures from a base: how it becomes a pipeline of diffusers, and the pipeline at work."""
