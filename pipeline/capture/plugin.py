"""The entry point vLLM calls in every process it starts (`vllm.general_plugins` in pyproject.toml).

Does nothing unless this program asked for a capture: any other engine is vLLM's own.
"""

import os

__all__ = ["CAPTURE_VARIABLE", "register"]

# set by pipeline.capture.process before it starts an engine; worker processes inherit it
CAPTURE_VARIABLE = "LAYER61_CAPTURE"


def register() -> None:
    """Register the capturing DeepSeek classes, once, where the environment asks for them."""
    if os.environ.get(CAPTURE_VARIABLE) != "1":
        return
    from vllm import ModelRegistry

    for architecture in ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"):
        # by name: importing the class here would initialise a device in the wrong process
        ModelRegistry.register_model(architecture, f"pipeline.capture.model:Capturing{architecture}")
