"""What is known about models: families, recipes and the built-in demo model."""
