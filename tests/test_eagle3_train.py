"""Training of an EAGLE-3 draft by the same loop: its columns, its start, its vocabulary, its checkpoints."""

import json
import shutil

import pytest
import torch

from configs import run_dir as runs
from configs.errors import ConfigError, ContractError, InputError
from configs.load import load_config
from export import draft
from export.checkpoint import Checkpoint
from featurestore import open_store
from pipeline.capture.settings import check_aux_layers
from tests.stores import write_store
from train import evaluate, launch
from train.model import load_layer
from train.vocabulary import kept_tokens, stop_ids, token_counts

STEPS = 48
AUX = (2, 3)


@pytest.fixture(scope="module")
def target(four_layers):
    return four_layers


@pytest.fixture(scope="module")
def store(tmp_path_factory, target):
    path = tmp_path_factory.mktemp("store") / "store"
    return write_store(path, target, lengths=[24] * 48, aux_layers=AUX)


@pytest.fixture(scope="module")
def settings(store, target):
    return [
        f"target.path={target}",
        f"train.store={store}",
        "train.draft=eagle3",
        "train.dtype=float32",
        "train.tokens_per_rank=96",
        f"train.max_steps={STEPS}",
        "train.checkpoint_every=24",
        "train.evaluate_every=24",
        "train.warmup_steps=2",
        "train.learning_rate=1e-2",
    ]


def run(run_dir, settings, *more):
    return launch.run(load_config([], [*settings, f"run.dir={run_dir}", *more]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, settings):
    """A run with the target's head and all tokens."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    return run_dir, run(run_dir, settings)


def falls(run_dir):
    """Whether the loss of the last step is less than half that of the first."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == STEPS
    return losses[-1] < losses[0] / 2


def test_a_random_start_learns_and_its_checkpoint_is_a_draft_of_its_own_kind(plain, settings, target):
    run_dir, summary = plain
    assert falls(run_dir)
    weights = runs.locate(run_dir, "last") / "weights"
    layer = load_layer(target, weights=weights)
    assert type(layer).__name__ == "Eagle3Layer"
    assert layer.aux_layers == AUX
    assert "lm_head.weight" not in Checkpoint(weights)
    again = evaluate.run(load_config([], [*settings, f"run.dir={run_dir}", "evaluate.checkpoint=last"]))
    assert again["acceptance_length"] == pytest.approx(summary["acceptance_length"], abs=0.05)
    meta = runs.read_meta(runs.locate(run_dir, "last"))
    assert meta["draft"]["kind"] == "eagle3"
    assert meta["draft"]["aux_layers"] == list(AUX)
    assert meta["draft"]["mask_position_0"] is False


def test_the_start_depends_on_the_seed_alone(tmp_path, settings, target):
    short = ["train.max_steps=1", "train.learning_rate=1e-12", "train.checkpoint_every=1"]
    layers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, settings, *short, f"run.seed={seed}")
        weights = Checkpoint(runs.locate(tmp_path / name, "last") / "weights", config={})
        layers.append(weights.get("fc.weight"))
    assert torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[0], layers[2])
    # but for the norm before the head, which is the target's own
    assert torch.equal(weights.get("norm.weight"), Checkpoint(target).get("model.norm.weight"))


def test_a_run_goes_on_from_its_checkpoint_with_the_same_result(tmp_path, plain, settings):
    shutil.copytree(plain[0], tmp_path / "run")
    last = runs.locate(tmp_path / "run", "last")
    wanted = Checkpoint(last / "weights", config={})
    wanted = {name: wanted.get(name).clone() for name in wanted.names}
    shutil.rmtree(last)
    assert run(tmp_path / "run", settings)["steps"] == STEPS
    found = Checkpoint(runs.locate(tmp_path / "run", "last") / "weights", config={})
    assert all(torch.equal(found.get(name), tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("head", ["target", "trained"])
def test_a_pruned_draft_keeps_the_most_frequent_answer_tokens(tmp_path, settings, store, target, head):
    run(tmp_path / "run", settings, "eagle3.draft_vocab_size=40", f"eagle3.head={head}")
    weights = Checkpoint(runs.locate(tmp_path / "run", "last") / "weights")
    config = Checkpoint(target).config
    keep = kept_tokens(token_counts(open_store(store), config["vocab_size"]), 40, stop_ids(config), "x")
    d2t = weights.get("d2t")
    assert torch.equal(d2t + torch.arange(40), keep)
    assert torch.equal(weights.get("t2d").nonzero().flatten(), keep)
    assert config["eos_token_id"] in keep.tolist()
    rows = Checkpoint(target).get("lm_head.weight")[keep].bfloat16()
    assert torch.equal(weights.get("lm_head.weight"), rows) == (head == "target")
    assert falls(tmp_path / "run")
    meta = runs.read_meta(runs.locate(tmp_path / "run", "last"))
    assert meta["draft"]["vocabulary"]["size"] == 40
    assert meta["draft"]["head"] == head


def test_the_mtp_layer_trains_from_the_same_store(tmp_path, settings):
    run(tmp_path / "run", settings, "train.draft=mtp", "train.max_steps=2")
    assert runs.read_meta(runs.locate(tmp_path / "run", "last"))["draft"]["kind"] == "mtp"


def test_stores_and_settings_that_do_not_fit_are_refused(tmp_path, settings, target):
    bare = write_store(tmp_path / "bare", target, lengths=[24] * 8)
    with pytest.raises(ContractError, match="holds no layer inputs") as caught:
        run(tmp_path / "a", settings, f"train.store={bare}")
    assert "dump.aux_layers" in caught.value.hint
    # a dry run fails where the run would
    with pytest.raises(ContractError, match="holds no layer inputs"):
        launch.plan(load_config([], [*settings, f"run.dir={tmp_path / 'a'}", f"train.store={bare}"]))
    shifted = write_store(tmp_path / "shifted", target, lengths=[24] * 8, aux_layers=[1, 3])
    with pytest.raises(ConfigError, match="sglang adds 1"):
        run(tmp_path / "b", settings, f"train.store={shifted}")
    with pytest.raises(ConfigError, match="the target has 512 tokens"):
        run(tmp_path / "c", settings, "eagle3.draft_vocab_size=512")
    # said by a dry run too, and of a dump before it has taken hours
    for word, said in (
        (f"train.store={bare}", "holds no layer inputs"),
        (f"train.store={shifted}", "sglang adds 1"),
        ("eagle3.draft_vocab_size=512", "the target has 512 tokens"),
    ):
        with pytest.raises((ConfigError, ContractError), match=said):
            launch.plan(load_config([], [*settings, f"run.dir={tmp_path / 'd'}", word]))
    launch.plan(load_config([], [*settings, "eagle3.draft_vocab_size=64"]))
    with pytest.raises(ConfigError, match="sglang adds 1"):
        check_aux_layers(load_config([], ["dump.aux_layers=[1, 3]"]), Checkpoint(target).config)
    for words in ("export.layout=stitched", "export.quantization=fp8"):
        with pytest.raises(ConfigError, match="an EAGLE-3 draft has one layout, in bfloat16"):
            load_config([], ["train.draft=eagle3", words])
    with pytest.raises(ConfigError, match=r"eagle3.fc_norm is set, but train.draft is 'mtp'"):
        load_config([], ["eagle3.fc_norm=true"])
    with pytest.raises(ConfigError, match="ascending"):
        load_config([], ["dump.aux_layers=[3, 2]"])


def test_the_plan_of_an_export_refuses_what_the_export_would(tmp_path, plain, settings):
    words = [*settings, f"run.dir={plain[0]}", f"export.dir={tmp_path / 'out'}"]
    draft.run(load_config([], words))
    assert "EAGLE-3 draft of step" in draft.plan(load_config([], words))
    for changed, said in (
        ("export.draft_vocab_size=64", "draft_vocab_size was None, asked for is 64"),
        (f"export.dir={tmp_path}", "is not an export of this program"),
        ("export.checkpoint=released", "no EAGLE-3 draft"),
    ):
        with pytest.raises(InputError, match=said):
            draft.plan(load_config([], [*words, changed]))


def test_a_draft_of_another_store_or_architecture_is_refused(tmp_path, plain, settings, target):
    weights = runs.locate(plain[0], "last") / "weights"
    other = write_store(tmp_path / "other", target, lengths=[24] * 16, aux_layers=[2])
    config = load_config([], [*settings, f"run.dir={plain[0]}", f"train.store={other}"])
    with pytest.raises(
        ContractError, match=r"starts from the inputs of layers \[2, 3\], the store holds \[2\]"
    ):
        evaluate.run(config)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in weights.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    said = json.loads((copy / "config.json").read_text())
    for changes, message in (
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "LlamaForCausalLMEagle3"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 9]}, "layers \\[2, 9\\]"),
        ({"hidden_size": 128}, "hidden_size 128, not 64"),
        ({"draft_vocab_size": 40}, "can say 40 of 512 tokens, and has no d2t"),
    ):
        (copy / "config.json").write_text(json.dumps(said | changes))
        with pytest.raises(InputError, match=message):
            load_layer(target, weights=copy)


def test_every_verb_takes_an_eagle3_run_and_a_path_that_says_so(
    tmp_path, settings, target, conversations_file
):
    from pipeline import verify

    named = [*settings, f"run.dir={tmp_path / 'demo-eagle3'}", f"prompts.path={conversations_file}"]
    engine = ["dump.vllm.max_num_seqs=8", "export.draft_vocab_size=40"]
    config = load_config([], [*named, *engine, "prompts.max_length=64", "prompts.max_answer_tokens=32"])
    assert config.export_dir.name == "eagle3"
    assert "not yet" in verify.plan(config)
    with pytest.raises(ConfigError, match="eagle"):
        verify.plan(config.model_copy(update={"train": config.train.model_copy(update={"draft": "mtp"})}))
    with pytest.raises(ConfigError, match="an MTP draft has the target's head"):
        load_config([], ["export.draft_vocab_size=40"])


def test_tokens_are_counted_by_document_the_held_out_ones_left_out(store, target):
    opened, size = open_store(store), Checkpoint(target).config["vocab_size"]
    by_hand = torch.zeros(size, dtype=torch.int64)
    for document in opened:
        if not document.held_out:
            by_hand += torch.bincount(document.input_ids[document.loss_mask], minlength=size)
    assert opened.held_out.any()
    assert torch.equal(torch.from_numpy(token_counts(opened, size)), by_hand)
