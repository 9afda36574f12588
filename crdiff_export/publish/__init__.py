"""The writing side of the Hugging Face Hub: pushes, model cards and plan files."""
