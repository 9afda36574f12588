"""Bytes on disk become values: safetensors, shards, torch pickles, dtypes, hashes. Knows no model.

Other rooms import its modules one by one, so that `crdiff --help`, which needs only `text`, loads no other.
"""
