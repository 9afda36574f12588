"""The search for ratios, and the check of its result on prompts that it never saw."""
