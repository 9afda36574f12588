"""The Hugging Face Hub, writing side: pushes, model cards and plan files.

Begin with `run.py` for a plan file, and with `request.py` for the push of one file. `card` writes the model card.
Other rooms import these modules by their names: an export that pushes nothing loads no plan files.
"""
