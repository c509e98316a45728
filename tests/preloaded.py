"""What a rank imports as it starts: those that tests fork from a process that has it need not."""

from configs.importing import importing

# what is here stays, and need not be looked through by each rank
with importing():
    from pipeline import cli  # noqa: F401
    from tests import rank_jobs  # noqa: F401
    from train import launch, zero  # noqa: F401

    zero.import_optimizers()
