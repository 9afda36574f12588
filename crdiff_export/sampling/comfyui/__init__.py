"""POA in ComfyUI: a pack of two nodes, and how it gets into a ComfyUI.

`install` writes a folder of custom nodes, `custom_node` is that folder's `__init__.py`, `nodes` are the nodes, `patch`
is what "CR-Diff POA" does to a model, `match` tells which model that is, `listing` finds baked files. ComfyUI's own
modules are imported in functions only, so that this package can be imported without ComfyUI.
"""
