"""POA in ComfyUI: three nodes, their installation, and an example workflow.

Begin with `nodes`, which ComfyUI calls. `match` compares its model with a baked file, `patch` lets the model sample
with POA, `listing` finds baked files among ComfyUI's models. `install` writes a folder of custom nodes, whose
`__init__.py` is `custom_node`. `tools/comfyui_workflow.py` writes `example_workflows`. ComfyUI's own modules are
imported in functions only, so that this folder can be imported without ComfyUI.
"""
