"""Bytes on disk become values: safetensors, shards, torch pickles, dtypes, hashes. Knows no model."""
