"""Blocks: the documents of a dump cut into units of work, which can be repeated, resumed and shared out.

The documents of the input file are cut into blocks of `dump.block_documents` in their order. A block's name
is a hash of what it holds, and is the name of the part it becomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.contract import target_contract
from configs.files import sha256_json
from configs.schema import RunConfig
from pipeline.prompts import Document, Prompts

__all__ = ["Block", "blocks", "share"]


@dataclass(frozen=True, eq=False)
class Block:
    """The unit of work, retry and commit; `name` is that of its part."""

    name: str
    documents: tuple[Document, ...]

    @property
    def most_tokens(self) -> int:
        """Tokens if every answer is as long as it may be."""
        return sum(len(d.input_ids) + d.answer_tokens for d in self.documents)


def blocks(config: RunConfig, prompts: Prompts) -> list[Block]:
    """Cut the documents into blocks: a pure function of settings and input."""
    target = target_contract(config.require_target())
    common = [target.config_sha256, target.index_sha256, config.prompts.max_length, prompts.stop_ids]
    size = config.dump.block_documents
    found = []
    for i in range(0, len(prompts.documents), size):
        documents = prompts.documents[i : i + size]
        content = [[d.uid, d.answer_tokens] for d in documents]
        found.append(Block(f"{sha256_json([common, content])[:12]}-{i // size:06d}", documents))
    return found


def share(config: RunConfig, all_blocks: Sequence[Block]) -> list[Block]:
    """Every n-th block, from the k-th on, of `dump.worker` k/n."""
    k, n = map(int, config.dump.worker.split("/"))
    return list(all_blocks[k - 1 :: n])
