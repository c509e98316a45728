"""The feature store, format 1: ragged bf16 hidden states in immutable Zarr v3 parts."""
