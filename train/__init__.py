"""Stage two: the layer-61 model, its unroll and losses, and the ZeRO-3 trainer."""
