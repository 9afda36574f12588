"""A Hugging Face Hub that lives in the test's own process; `loopback_hub` has the fixtures."""
