"""Every setting, once. Two levels deep: a section, then a key; the docstring under a key is its help text.

Keys marked `free` may change between two starts in one run directory: they decide how the work is done,
never what its result is.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs import run_dir
from configs.errors import ConfigError

__all__ = [
    "MOST_DRAFTS",
    "OWNED",
    "DumpConfig",
    "Eagle3Config",
    "EvaluateConfig",
    "ExportConfig",
    "PromptsConfig",
    "RunConfig",
    "RunSection",
    "Section",
    "ServeConfig",
    "TargetConfig",
    "TinyConfig",
    "TrainConfig",
    "VerifyConfig",
]

# draft tokens a step, at most
MOST_DRAFTS = 16
FREE: dict[str, Any] = {"free": True}


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, field docstrings kept as help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_null(cls, given: Any) -> Any:
        """TOML has no null: the word stands for it where nothing is the default."""
        if not isinstance(given, dict):
            return given
        optional = {key for key, field in cls.model_fields.items() if field.default is None}
        return {k: None if k in optional and v in ("null", "none") else v for k, v in given.items()}


class RunSection(Section):
    dir: Path = Path("runs/run")
    """Directory of this run: store, checkpoints, export and metrics lie below it."""
    seed: int = Field(0, ge=0)
    """Seed of document order, held-out choice and initialisation."""


class TargetConfig(Section):
    path: Path | None = None
    """Directory of the target checkpoint (config.json, safetensors files, tokenizer)."""


class TinyConfig(Section):
    """The tiny V3.2-shaped target that `layer61 target` builds; sizes use config.json spellings."""

    conversations: Path = Path("data/conversations.jsonl")
    """JSONL file that trains the tokenizer and the target."""
    hidden_size: int = Field(256, ge=64, multiple_of=32)
    """Width of the hidden state."""
    num_hidden_layers: int = Field(4, ge=2)
    """Backbone layers; the MTP layer comes after them."""
    num_attention_heads: int = Field(4, ge=1)
    """Attention heads."""
    intermediate_size: int = Field(768, ge=32)
    """Width of the dense feed-forward layers."""
    moe_intermediate_size: int = Field(128, ge=16)
    """Width of one expert."""
    n_routed_experts: int = Field(16, ge=4)
    """Routed experts of each mixture layer."""
    num_experts_per_tok: int = Field(4, ge=1)
    """Experts a token is sent to."""
    n_group: int = Field(4, ge=1)
    """Groups the routed experts are divided into."""
    topk_group: int = Field(2, ge=1)
    """Groups a token may be sent to."""
    first_k_dense_replace: int = Field(1, ge=0)
    """First backbone layers with a dense feed-forward instead of a mixture."""
    q_lora_rank: int = Field(128, ge=16)
    """Width of the compressed queries."""
    qk_nope_head_dim: int = Field(64, ge=16)
    """Width of the part of a head that is not rotated; the rotated part is 64, the compressed keys 512."""
    v_head_dim: int = Field(64, ge=16)
    """Width of the values of a head."""
    index_n_heads: int = Field(4, ge=1)
    """Heads of the indexer; its tensors are written and never trained."""
    index_head_dim: int = Field(128, ge=64)
    """Width of an indexer head, its 64 rotated dimensions included."""
    index_topk: int = Field(2048, ge=1)
    """Tokens up to which sparse attention equals dense attention."""
    vocab_size: int = Field(4096, ge=512)
    """Size of the byte-pair vocabulary trained on the conversations."""
    train_tokens: int = Field(614_400, ge=1)
    """Tokens of training; fixed so that two builds give the same target."""
    sequence_length: int = Field(2048, ge=32)
    """Tokens of one packed training batch; longer conversations are cut there."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak AdamW learning rate."""
    mtp_loss_weight: float = Field(0.3, ge=0)
    """Weight of the MTP layer's loss beside the backbone's."""

    @model_validator(mode="after")
    def check(self) -> "TinyConfig":
        """Refuse sizes that do not fit one another. Raises ValueError naming both."""
        if self.n_routed_experts % self.n_group or self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_routed_experts = {self.n_routed_experts} does not divide into n_group = {self.n_group}"
                " groups of two or more"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} is more than n_group = {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than the {reachable} experts of"
                f" topk_group = {self.topk_group} groups"
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {self.first_k_dense_replace} leaves no mixture layer among"
                f" num_hidden_layers = {self.num_hidden_layers}"
            )
        return self


class PromptsConfig(Section):
    path: Path | tuple[Path, ...] | None = None
    """Conversations: a file (JSONL, plain or compressed, or Parquet), a pattern, or a list of either."""
    answers: Literal["target", "every", "given"] = "target"
    """`target`: the target writes the last answer; `every`: all of them in turn; `given`: the file's stay."""
    thinking: Literal["auto", "on", "off", "both"] = "auto"
    """Whether answers reason first; `auto`: where the file's last one does; `both`: a document each."""
    temperature: float = Field(1.0, ge=0)
    """Temperature of the target's answers; 0 always takes the most likely token."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Answers are sampled from the most likely tokens that hold this probability together."""
    max_length: int = Field(2048, ge=8)
    """Longest document in tokens, answer included; longer conversations are rejected."""
    max_answer_tokens: int = Field(1024, ge=1)
    """Most tokens the target may write for one answer."""
    max_loop_share: float = Field(0.3, ge=0, le=1)
    """Documents with more of their answer's tokens in loops are rejected; 1 keeps all."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of the conversations kept from training, chosen by a hash of their content."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many conversations of all files together."""


class DumpConfig(Section):
    store: str | None = None
    """Path or s3:// URL of the feature store; by default `store` in the run directory."""
    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the target; transformers is several times slower, needs no vLLM, and has sparse attention
    without a GPU."""
    view: Literal["auto", "native", "v3"] = "auto"
    """How the engine sees a V3.2 checkpoint: natively, or through a V3 view without sparse attention."""
    aux_layers: tuple[int, ...] = ()
    """Layers whose inputs are stored as well, ascending: [2, 30, 58] for an EAGLE-3 draft of V3.2."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one engine."""
    block_documents: int = Field(64, ge=1)
    """Documents of a part of the store, which is committed whole."""
    open_parts: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Parts taken at a time, so that the engine never runs empty; by default 1 on CPU, which makes a
    resumed dump equal to an undisturbed one bit for bit, and 3 on GPUs."""
    publish: Literal["input", "all"] = Field("input", json_schema_extra=FREE)
    """What readers see of the store: just the documents of this input, or those of earlier ones as well."""
    max_bad_share: float = Field(0.01, ge=0, le=1, json_schema_extra=FREE)
    """Share of documents whose states may come back wrong, beyond a few, before the dump stops."""
    worker: Annotated[str, Field(pattern=r"^[1-9]\d*/[1-9]\d*$")] = Field("1/1", json_schema_extra=FREE)
    """`k/n`: do the k-th of n fixed slices of the conversations, one machine each."""
    ray: bool = Field(False, json_schema_extra=FREE)
    """Spread the parts over the Ray cluster at RAY_ADDRESS, or over the one of this machine."""
    writer_threads: int = Field(2, ge=1, json_schema_extra=FREE)
    """Threads that write finished documents."""
    queue_bytes: int = Field(1 << 30, ge=1, json_schema_extra=FREE)
    """Bytes of finished states that may wait for the writers before the engine is held back."""
    compression: Literal["none", "zstd"] = "none"
    """Codec of the stored states; lossless bf16 saves at most a third."""
    probe: bool = True
    """Recompute one document at each start and compare it with the first run's states."""
    batch_tokens: int = Field(2048, ge=1, json_schema_extra=FREE)
    """transformers: longest text read at once; longer ones are read in pieces, shorter ones together, with as
    many attention weights in memory."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's engine untouched, where that is the engine."""
    transformers: dict[str, Any] = Field(default_factory=dict)
    """Passed to transformers' `from_pretrained` untouched, where that is the engine, as `dtype`."""


class TrainConfig(Section):
    draft: Literal["mtp", "eagle3"] = "mtp"
    """`mtp`: the target's own layer, trained further; `eagle3`: a small dense one from scratch ([eagle3])."""
    store: str | None = None
    """Path or URL of the feature store; by default the one of `[dump]`."""
    ranks: int = Field(1, ge=1, json_schema_extra=FREE)
    """Processes started on this machine; ignored under torchrun or the deepspeed launcher."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters and matrix products; master weights and moments are float32 in both cases."""
    num_steps: int = Field(3, ge=1, le=16)
    """Draft steps of the unroll."""
    step_decay: float = Field(0.8, gt=0, le=1)
    """Weight of step s is `step_decay ** s`, normalised to sum 1."""
    loss: Literal["kl", "ce", "lk_alpha", "lk_lambda", "tv"] = "kl"
    """Loss of one predicted token against the target's distribution (ce: against the token itself)."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions in the loss."""
    mask_position_0: bool = True
    """Zero the embedding at position 0, as vLLM does."""
    tokens_per_rank: int = Field(4096, ge=16)
    """Token budget of one packed micro-batch on one rank."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches of one optimizer step."""
    max_steps: int | None = Field(None, ge=1, json_schema_extra=FREE)
    """Optimizer steps; by default `epochs` passes over the store. A run goes on when there are more."""
    epochs: float = Field(1.0, gt=0, json_schema_extra=FREE)
    """Passes over the training documents, when `max_steps` is not set. A run goes on when there are more."""
    new_data: bool = Field(False, json_schema_extra=FREE)
    """Go on with the documents the store has now, in a new pass, not with those of the first start."""
    init_from: Path | None = None
    """Start from these weights: a run directory (its best checkpoint), a checkpoint or an export."""
    learning_rate: float = Field(3e-5, gt=0)
    """Peak learning rate."""
    learning_rate_of: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Factor of the learning rate by name prefix of layer parameters, as in {"mlp.experts." = 0.5}."""
    warmup_steps: int = Field(20, ge=0)
    """Steps of linear warm-up; cosine decay to `min_learning_rate_ratio` follows."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate as a share of the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay; norms have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW second-moment decay."""
    gradient_clipping: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    max_skipped_steps: int = Field(5, ge=1, json_schema_extra=FREE)
    """Steps in a row without finite gradients, each skipped and logged, after which the run ends."""
    freeze: tuple[str, ...] = ("self_attn.indexer.", "mlp.gate.weight")
    """Name prefixes of layer parameters that stay as released; embedding, head and router bias always do.
    Of the indexer `train.indexer` decides."""
    attention: Literal["auto", "dense", "sparse"] = "auto"
    """`sparse`: to the keys that the layer's indexer chooses, as served; `dense`: to all; `auto`: sparse
    exactly where the store holds documents for which the two differ, those above index_topk tokens."""
    indexer: Literal["frozen", "warmup", "joint"] = "frozen"
    """`warmup`: train nothing but the indexer, towards where dense attention puts its weight; `joint`: train
    it beside the layer, over the keys it keeps."""
    indexer_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of a trained indexer; by default 1e-3 for `warmup`, `learning_rate` for `joint`."""
    indexer_loss_weight: float = Field(0.01, gt=0)
    """Weight of a trained indexer's own loss. AdamW's step does not depend on it, but `gradient_clipping` is
    over all gradients together: at 1 the indexer's were up to 13 times the layer's, and small they leave the
    layer's clipped as beside a frozen indexer."""
    moe_backend: Literal["auto", "torch", "grouped_mm", "triton"] = "auto"
    """Expert kernels; `auto` takes Triton on CUDA and the fastest torch form elsewhere."""
    checkpoint_every: int = Field(200, ge=1, json_schema_extra=FREE)
    """Steps between checkpoints; the last step always has one."""
    checkpoint_minutes: float | None = Field(None, gt=0, json_schema_extra=FREE)
    """Most minutes between checkpoints, whatever the number of steps."""
    keep_checkpoints: int = Field(2, ge=1, json_schema_extra=FREE)
    """Newest checkpoints kept; the best by offline acceptance is kept as well."""
    evaluate_every: int = Field(200, ge=1, json_schema_extra=FREE)
    """Steps between evaluations on the held-out documents."""
    evaluate_documents: int = Field(64, ge=1, json_schema_extra=FREE)
    """Held-out documents of one evaluation during training."""
    tensorboard: bool = Field(False, json_schema_extra=FREE)
    """Write what `metrics.jsonl` says for TensorBoard too, into `tensorboard` in the run directory."""
    wandb_project: str | None = Field(None, min_length=1, json_schema_extra=FREE)
    """Log what `metrics.jsonl` says to this project of Weights & Biases too."""
    loader_threads: int = Field(2, ge=1, json_schema_extra=FREE)
    """Threads that read documents ahead."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged into the DeepSpeed configuration untouched."""


class Eagle3Config(Section):
    """The EAGLE-3 draft; it starts from the inputs of every layer in `dump.aux_layers`."""

    intermediate_size: int | None = Field(None, ge=16)
    """Width of its feed-forward; by default that of the target's dense layers."""
    carry: Literal["pre_norm", "post_norm"] = "pre_norm"
    """What a draft step hands to the next: its state before or after its last norm."""
    fc_norm: bool = False
    """Norm each layer input before they are joined."""
    head: Literal["target", "trained"] = "target"
    """`target`: the target's head, frozen; `trained`: an own copy of it, trained along and exported."""
    draft_vocab_size: int | None = Field(None, ge=2)
    """Train with so many tokens: the most frequent of the store's answers; all by default."""


class EvaluateConfig(Section):
    checkpoint: str = "best"
    """`best`, `last`, `step_000200`, `released` (before training), or the path of a checkpoint or export."""
    num_speculative_tokens: int = Field(3, ge=1, le=MOST_DRAFTS)
    """Draft tokens a step."""
    num_steps_max: int = Field(6, ge=1, le=MOST_DRAFTS)
    """Acceptance is told for every number of draft tokens up to this one."""
    max_documents: int | None = Field(None, ge=1)
    """Held-out documents to use; all by default."""


class ExportConfig(Section):
    dir: Path | None = None
    """Directory to write; by default `nextn` in the run directory, `eagle3` for such a draft."""
    checkpoint: str = "best"
    """`best`, `last`, `step_000200`, `released` (before training), or the path of a checkpoint or export."""
    layout: Literal["nextn", "sglang-legacy", "stitched"] = "nextn"
    """`nextn`: layer-61 names, both servers; `sglang-legacy`: layers.0; `stitched`: target plus draft."""
    quantization: Literal["auto", "none", "fp8"] = "auto"
    """`auto` takes the target's own quantisation, which vLLM requires of an MTP draft."""
    replace: bool = False
    """Write over another export of this program, or a damaged one, in that directory."""
    draft_vocab_size: int | None = Field(None, ge=2)
    """Keep so many tokens of an EAGLE-3 draft: the most frequent of the store's answers; all by default."""


class VerifyConfig(Section):
    checkpoint: str = "best"
    """Which one the export must be of, named as in `export.checkpoint`; another one is not served."""
    num_speculative_tokens: int = Field(3, ge=1, le=MOST_DRAFTS)
    """Draft tokens a step."""
    num_steps_max: int = Field(6, ge=1, le=MOST_DRAFTS)
    """Acceptance is told for every number of draft tokens up to this one, which is served as well."""
    max_conversations: int | None = Field(None, ge=1)
    """Held-out conversations to serve; all by default."""
    max_tokens: int = Field(256, ge=2)
    """Most tokens of one answer."""
    drafts: tuple[str, ...] = Field(("released", "trained"), min_length=1)
    """What to compare: `released` (the target's own layer), `trained` (the export), directories of drafts."""
    temperature: float = Field(1.0, ge=0)
    """Measured as well, with `prompts.top_p`, beside temperature 0; with 0 that is all."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM's engine untouched."""


class ServeConfig(Section):
    draft: str = "trained"
    """`trained` (the export), `released` (the target's own layer), `none`, or the directory of a draft."""
    num_speculative_tokens: int = Field(3, ge=1, le=MOST_DRAFTS)
    """Draft tokens a step."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    every_seconds: float = Field(5.0, gt=0)
    """Seconds between two lines about what was served."""
    bench_drafts: tuple[str, ...] = Field(("none", "trained"), min_length=1)
    """`bench-serve`: what to serve in turn, each as `draft`; ratios are to the first."""
    bench_concurrency: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 16), min_length=1)
    """`bench-serve`: requests at a time, measured in turn."""
    bench_conversations: int | None = Field(None, ge=1)
    """`bench-serve`: held-out conversations of one measurement; all by default."""
    bench_max_tokens: int = Field(256, ge=2)
    """`bench-serve`: most tokens of one answer."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed to `vllm serve` untouched; `max_model_len = 8192` becomes `--max-model-len 8192`."""


# settings of vLLM that an engine of a dump cannot have, by how their names begin, and why
NOT_IN_A_DUMP = {
    # a dump steps each engine by itself, and the data-parallel ranks of one would have to step together
    "data_parallel_": "cannot be data-parallel",
    # the rank that writes would hold the states of some tokens only
    **dict.fromkeys(
        ("decode_context_parallel_", "prefill_context_parallel_", "dcp_", "cp_kv_cache_"),
        "cannot divide a document's tokens over ranks",
    ),
}

# keys of the pass-through tables that another setting decides
OWNED: dict[str, frozenset[str]] = {
    "dump.vllm": frozenset(
        {"model", "tokenizer", "tensor_parallel_size", "max_model_len", "seed", "speculative_config"}
        | {"kv_transfer_config", "skip_tokenizer_init", "hf_overrides", "hf_config_path"}
        | {"worker_extension_cls"}
    ),
    "dump.transformers": frozenset({"config", "state_dict", "output_loading_info", "local_files_only"}),
    "verify.vllm": frozenset({"model", "tokenizer", "tensor_parallel_size", "seed", "speculative_config"}),
    "serve.vllm": frozenset(
        {"model", "tokenizer", "tensor_parallel_size", "speculative_config", "host", "port"}
        | {"data_parallel_multi_port_external_lb"}
    ),
    "train.deepspeed": frozenset(
        {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
        | {"gradient_clipping", "bf16", "fp16", "optimizer", "scheduler", "zero_optimization.stage"}
    ),
}


class RunConfig(Section):
    """The whole configuration of a run."""

    run: RunSection = RunSection()
    target: TargetConfig = TargetConfig()
    tiny: TinyConfig = TinyConfig()
    prompts: PromptsConfig = PromptsConfig()
    dump: DumpConfig = DumpConfig()
    train: TrainConfig = TrainConfig()
    eagle3: Eagle3Config = Eagle3Config()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    verify: VerifyConfig = VerifyConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def check(self) -> "RunConfig":
        """Refuse settings that contradict one another. Raises ValueError naming both."""
        k, n = map(int, self.dump.worker.split("/"))
        if k > n:
            raise ValueError(f"dump.worker = {self.dump.worker!r}: the slice is beyond the number of slices")
        if self.prompts.max_answer_tokens >= self.prompts.max_length:
            raise ValueError(
                f"prompts.max_answer_tokens = {self.prompts.max_answer_tokens} leaves no room for a prompt in"
                f" prompts.max_length = {self.prompts.max_length}"
            )
        ids = self.dump.aux_layers
        if any(a >= b for a, b in zip((0, *ids), ids, strict=False)):
            raise ValueError(
                f"dump.aux_layers = {list(ids)}: expected layers above 0, ascending; what enters layer 0 is"
                " the embedding"
            )
        if self.train.draft != "eagle3":
            changed = [k for k, v in self.eagle3 if v != Eagle3Config.model_fields[k].default]
            if changed:
                raise ValueError(f"eagle3.{changed[0]} is set, but train.draft is {self.train.draft!r}")
            if self.export.draft_vocab_size is not None:
                raise ValueError("export.draft_vocab_size is set, but an MTP draft has the target's head")
        elif self.export.layout != "nextn" or self.export.quantization == "fp8":
            raise ValueError(
                f"export.layout = {self.export.layout!r}, export.quantization = {self.export.quantization!r}:"
                " an EAGLE-3 draft has one layout, in bfloat16"
            )
        if self.prompts.answers == "given" and self.prompts.thinking == "both":
            raise ValueError(
                "prompts.thinking = 'both' needs the target's answers: prompts.answers = 'given'"
            )
        if self.dump.engine == "transformers" and self.dump.tensor_parallel_size > 1:
            raise ValueError(
                f"dump.tensor_parallel_size = {self.dump.tensor_parallel_size} is vLLM's: transformers"
                " spreads a target over all GPUs by itself"
            )
        for name in sorted(self.dump.vllm):
            why = next((w for start, w in NOT_IN_A_DUMP.items() if name.startswith(start)), None)
            if why is not None:
                raise ValueError(
                    f"dump.vllm.{name}: an engine of a dump {why}; give it GPUs with"
                    " dump.tensor_parallel_size, and start several with dump.worker or dump.ray"
                )
        lists: dict[str, tuple[Any, ...]] = {
            "verify.drafts": self.verify.drafts,
            "serve.bench_drafts": self.serve.bench_drafts,
            "serve.bench_concurrency": self.serve.bench_concurrency,
        }
        for key, named in lists.items():
            twice = next((name for n, name in enumerate(named) if name in named[:n]), None)
            if twice is not None:
                raise ValueError(f"{key} names {twice!r} twice, and each is measured once")
        for table, owned in OWNED.items():
            section, key = table.split(".")
            value = getattr(getattr(self, section), key)
            for name in sorted(owned):
                found: Any = value
                for part in name.split("."):
                    found = found.get(part) if isinstance(found, dict) else None
                if found is not None:
                    raise ValueError(
                        f"{table}.{name} is decided by another setting and cannot be passed through"
                    )
        return self

    def require_target(self) -> Path:
        """`target.path`, for a verb that cannot do without.

        Raises:
            ConfigError: it is not set.
        """
        if self.target.path is None:
            raise ConfigError("target.path is not set", "set it to the directory of the target checkpoint")
        return self.target.path

    @property
    def trained(self) -> TrainConfig:
        """`[train]` with what the kind of draft freezes as well: rows of the target's head."""
        if self.train.draft == "mtp" or self.eagle3.head == "trained" or not self.eagle3.draft_vocab_size:
            return self.train
        return self.train.model_copy(update={"freeze": (*self.train.freeze, "own_head.")})

    @property
    def store_path(self) -> str:
        """Where `dump` writes: `dump.store`, or `store` in the run directory."""
        return self.dump.store or str(self.run.dir / run_dir.STORE)

    @property
    def train_store_path(self) -> str:
        """Where `train` and `evaluate` read: `train.store`, or the store of `dump`."""
        return self.train.store or self.store_path

    @property
    def export_dir(self) -> Path:
        """Where `export` writes: `export.dir`, or `nextn` or `eagle3` in the run directory."""
        return self.export.dir or self.run.dir / run_dir.EXPORT[self.train.draft]
