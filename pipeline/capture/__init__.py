"""Capture: the target runs in an engine of its own process and its states stream into the store."""
