"""The tiny V3.2-shaped target: the only part of the pipeline that imports the trainer's modules."""
