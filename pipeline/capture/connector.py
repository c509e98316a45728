"""The KV connector of a capture: from the engine's paged cache of states into the parts of a feature store.

vLLM makes one object of `StoreConnector` beside the scheduler and one in every worker. The scheduler's object
holds a finished request's blocks back and says which of their rows belong to a document. The object of the
worker that writes copies the rows out, lets the blocks go, and hands the rows to threads that check them and
append them to their open part, in the order in which the requests finished. When more
bytes wait for the threads than `queue_bytes`, the next request keeps its blocks, and so the engine admits no
new ones.

`CaptureWorker` adds the calls by which the driver opens and closes parts.

Legend: T tokens of a document, S states of a token, D width of a state, N blocks, B tokens of a block.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from configs.errors import CaptureError
from pipeline.capture.routers import Routers
from pipeline.capture.writers import Writers

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["CaptureWorker", "StoreConnector"]


@dataclass(frozen=True)
class Save:
    """A finished request: rows `0..len(token_ids)` of its blocks are the states of `document`."""

    request_id: str
    document: dict[str, Any]
    token_ids: list[int]
    block_ids: list[int]


@dataclass
class SaveList(KVConnectorMetadata):
    saves: list[Save] = field(default_factory=list)


class StoreConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes the captured states of requests that carry `kv_transfer_params = {"layer61": document}`.

    A document is {"part", "uid", "spans", "source", "held_out", "written", "stop", "goes_on"}: the part it
    goes to, the token spans its loss mask covers ([start, stop), stop None = the end), whether the target
    writes its answers, and the token ids that end one. Rows after the first such token of the answer are
    dropped, as is the last sampled token, which was never an input. An answer that has an end, at token
    `goes_on` or before, is not the last of its conversation and nothing is kept of it; None where it always
    is. With `part` None the states are kept for `take` instead.

    Extra configuration: `writer_threads`, `queue_bytes`, `max_loop_share`, and `aux_layers`, whose inputs are
    stored as well.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._group = _states_group(kv_cache_config)
        self._saves: list[Save] = []
        self._held: set[str] = set()  # requests whose blocks are held back (scheduler)
        self._pending: deque[Save] = deque()  # finished, rows not copied yet (worker)
        self._copied: set[str] = set()
        self._finished: set[str] = set()
        self._cache: torch.Tensor | None = None
        self._writers: Writers | None = None
        self._stream: Any = None
        self._kept: dict[int, torch.Tensor] = {}

    # ---------------------------------------------------------------- scheduler

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: "Request", blocks: Any, num_external_tokens: int) -> None:
        return

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        saves, self._saves = self._saves, []
        return SaveList(saves)

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Hold the blocks of a finished or aborted request back until its rows are copied."""
        document = (request.kv_transfer_params or {}).get("layer61")
        if document is None or self._group >= len(block_ids):
            return False, None
        prompt = request.num_prompt_tokens
        ids = list(request.all_token_ids)[: max(len(request.all_token_ids) - 1, prompt)]
        stop = set(document["stop"])
        ends = next((i + 1 for i in range(prompt, len(ids)) if ids[i] in stop), None)
        if ends is not None and document["goes_on"] is not None and ends <= document["goes_on"]:
            return False, None
        end = len(ids) if ends is None else ends
        ids = ids[: min(end, request.num_computed_tokens)]
        self._saves.append(Save(request.request_id, document, ids, list(block_ids[self._group])))
        self._held.add(request.request_id)
        return True, None

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._held -= connector_output.finished_sending or set()

    def has_pending_block_frees(self) -> bool:
        """Blocks will come free without preempting a running request."""
        return bool(self._held)

    def get_finished_count(self) -> int:
        """Only the first worker copies, so one notification ends a request."""
        return 1

    # ------------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        if get_tensor_model_parallel_rank() != 0 or (not layers and not get_pp_group().is_last_rank):
            return
        if len(layers) != 1:
            raise CaptureError(f"the engine has {len(layers)} caches of states, expected one")
        cache_NSBD = kv_caches[next(iter(layers))]
        block = self._kv_cache_config.kv_cache_groups[self._group].kv_cache_spec.block_size
        extra = self._kv_transfer_config.get_from_extra_config
        states = 1 + len(extra("aux_layers", ()))
        expected = [states, block, self._vllm_config.model_config.get_hidden_size()]
        if list(cache_NSBD.shape[1:]) != expected:
            raise CaptureError(
                f"the cache of states has blocks of shape {list(cache_NSBD.shape[1:])}, expected"
                f" {expected}: its rows could not be found by the block table",
                "set another block_size in [dump.vllm]",
            )
        self._cache = cache_NSBD
        self._writers = Writers(
            extra("writer_threads", 1), extra("queue_bytes", 1 << 30), extra("max_loop_share", 1.0)
        )
        if self._cache.is_cuda:
            self._stream = torch.cuda.Stream()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        # the engine caches the states itself; they are read once the request is finished
        return

    def wait_for_save(self) -> None:
        return

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy the rows of finished requests as long as the writers have room; name those that are copied."""
        if self._writers is None:
            return None, None
        if self.has_connector_metadata():
            metadata = self._get_connector_metadata()
            assert isinstance(metadata, SaveList)
            self._pending += metadata.saves
            metadata.saves = []
        self._finished |= finished_req_ids
        while self._pending and self._writers.has_room(self._size(self._pending[0])):
            self._copy(self._pending.popleft())
        done = self._copied & self._finished
        self._copied -= done
        self._finished -= done
        return done or None, None

    def _size(self, save: Save) -> int:
        assert self._cache is not None
        return len(save.token_ids) * self._cache.shape[1] * self._cache.shape[3] * self._cache.element_size()

    def _copy(self, save: Save) -> None:
        assert self._cache is not None
        assert self._writers is not None
        # from pageable memory even an asynchronous copy would hold this thread, which launches the steps
        blocks = torch.tensor(save.block_ids, dtype=torch.long, pin_memory=self._cache.is_cuda)
        count = len(save.token_ids)
        event = None
        if self._stream is None:
            hidden_TSD = rows(self._cache, blocks, count)
        else:
            # the steps that wrote the rows are ahead in the default stream
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                on_device = rows(self._cache, blocks.to(self._cache.device, non_blocking=True), count)
                gathered = torch.cuda.Event()
                gathered.record()
                hidden_TSD = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
                hidden_TSD.copy_(on_device, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            # later steps may write into the freed blocks, but not before the rows are out of them
            torch.cuda.current_stream().wait_event(gathered)
        self._copied.add(save.request_id)
        if save.document["part"] is None:
            if event is not None:
                event.synchronize()
            self._kept[save.document["uid"]] = hidden_TSD
        else:
            self._writers.submit(save.document["part"], save.document, save.token_ids, hidden_TSD, event)

    # ------------------------------------------------------------------- driver

    @property
    def writers(self) -> Writers | None:
        """What writes, in the worker that does."""
        return self._writers

    def take(self, uid: int) -> np.ndarray | None:
        """States of a document without a part, bf16 bits as uint16 [T, S, D], once they are there."""
        hidden_TSD = self._kept.pop(uid, None)
        return None if hidden_TSD is None else hidden_TSD.to(torch.bfloat16).view(torch.uint16).numpy()


def _states_group(kv_cache_config: "KVCacheConfig") -> int:
    """Which group of layers shares block tables with the states."""
    groups = kv_cache_config.kv_cache_groups
    found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if len(found) == 1:
        return found[0]
    if not found and len(groups) == 1:
        return 0
    raise CaptureError(
        f"the states are in {len(found)} of {len(groups)} groups of cache layers, expected one"
    )


def rows(cache_NSBD: torch.Tensor, blocks: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` rows [T, S, D] of a list of blocks, copied."""
    # in words of eight bytes, which a CPU copies seven times as fast as single numbers
    picked_NSBD = cache_NSBD.view(torch.int64).index_select(0, blocks)
    return picked_NSBD.transpose(1, 2).flatten(0, 1)[:count].contiguous().view(cache_NSBD.dtype)


class CaptureWorker:
    """Mixed into the engine's workers (`worker_extension_cls`): the driver's calls, by `collective_rpc`."""

    def layer61_cudagraph_mode(self) -> Any:
        """Name of the mode of CUDA graphs that the engine has settled on."""
        mode = self.vllm_config.compilation_config.cudagraph_mode  # type: ignore[attr-defined]
        return mode.name

    def layer61_watch_routers(self) -> None:
        """From now on, write down which experts the routers choose; every rank has whole routers."""
        if get_tensor_model_parallel_rank() == 0:
            runner: Any = self.model_runner  # type: ignore[attr-defined]
            self.layer61_routers = Routers(runner.model, runner.model_config.hf_config)

    def layer61_experts(self, tokens: int) -> Any:
        """See `Routers.take`."""
        routers = getattr(self, "layer61_routers", None)
        return routers and routers.take(tokens)

    def layer61_open(self, name: str, store: str, contract: dict[str, Any], compression: str) -> Any:
        """See `Writers.open`."""
        writers = _connector().writers
        return writers and writers.open(name, store, contract, compression)

    def layer61_states(self, expected: dict[str, int]) -> Any:
        """See `Writers.states`."""
        writers = _connector().writers
        return writers and writers.states(expected)

    def layer61_commit(self, name: str, rejected: dict[int, str]) -> None:
        """See `Writers.commit`."""
        writers = _connector().writers
        if writers is not None:
            writers.commit(name, rejected)

    def layer61_close(self, name: str) -> None:
        """See `Writers.close`."""
        writers = _connector().writers
        if writers is not None:
            writers.close(name)

    def layer61_take(self, uid: int) -> Any:
        """See `StoreConnector.take`."""
        return _connector().take(uid)


def _connector() -> StoreConnector:
    connector = get_kv_transfer_group()
    assert isinstance(connector, StoreConnector)
    return connector
