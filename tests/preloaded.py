"""What a rank imports as it starts: those that tests fork from a process that has it need not."""

import gc

import torch._dynamo  # noqa: F401

from tests import rank_jobs  # noqa: F401
from train import zero

zero.import_muon()
# what is here stays, and need not be looked through by each rank
gc.collect()
gc.freeze()
