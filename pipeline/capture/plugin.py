"""The entry point vLLM calls in every process it starts (`vllm.general_plugins` in pyproject.toml).

Any engine but one of a capture is vLLM's own, with one fault mended where it runs on CPU.
"""

import os

from pipeline import cpu_sampling

__all__ = ["CAPTURE_VARIABLE", "register"]

# set by pipeline.capture.process before it starts an engine; worker processes inherit it
CAPTURE_VARIABLE = "LAYER61_CAPTURE"


def register() -> None:
    """Mend sampling on CPU; register the capturing DeepSeek classes where the environment asks for them."""
    cpu_sampling.mend()
    if os.environ.get(CAPTURE_VARIABLE) != "1":
        return
    from vllm import ModelRegistry

    for architecture in ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"):
        # by name: importing the class here would initialise a device in the wrong process
        ModelRegistry.register_model(architecture, f"pipeline.capture.model:Capturing{architecture}")
