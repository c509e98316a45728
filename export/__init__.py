"""The checkpoint format, read and written: key maps, block fp8, directories that servers load as drafts.

Training reads it (`checkpoint`, `keymap`, `fp8`); `nextn` and `draft`, the verb, write it.
"""
