"""Reading a baked file back: inspect it, verify it, compare it with its base, restore the base."""
