"""Checkpoint key maps, block fp8 and the NextN directory that vLLM and sglang load."""
