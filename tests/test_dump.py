"""Stage one as a whole: what it announces, what it refuses, and that killing it changes nothing."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from configs.errors import CaptureError, ConfigError, ContractError, InputError
from configs.files import write_json
from configs.held_out import is_held_out, uid_group
from configs.load import load_config
from configs.schema import RunConfig
from featurestore import StoreWriter, open_store
from pipeline.__main__ import main
from pipeline.capture.probe import check_states
from pipeline.capture.settings import contract
from pipeline.dump import plan, run
from pipeline.parts import cut, own_share
from pipeline.prompts import load_prompts

COUNT, BLOCK = 44, 4


def questions(count: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i * i % 7}?"},
                {"role": "assistant", "content": "It is known."},
            ]
        }
        for i in range(count)
    ]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path, tiny_checkpoint) -> RunConfig:
    file = write(tmp_path / "c.jsonl", questions(COUNT))
    return load_config(
        [],
        [
            f"run.dir={tmp_path / 'run'}",
            f"target.path={tiny_checkpoint}",
            f"prompts.path={file}",
            "prompts.max_length=128",
            "prompts.max_answer_tokens=32",
            "prompts.held_out=0.2",
            "prompts.max_loop_share=1",
            f"dump.block_documents={BLOCK}",
            "dump.view=v3",
            "dump.queue_bytes=8192",
        ],
    )


def changed(config: RunConfig, **values) -> RunConfig:
    sections = {}
    for name, value in values.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return config.model_copy(update={s: getattr(config, s).model_copy(update=v) for s, v in sections.items()})


def prompts_of(config: RunConfig):
    return load_prompts(config.prompts, config.target.path)


def test_plan_counts_and_writes_nothing(config, tiny_config):
    found = plan(config)
    per_token = 2 * tiny_config.hidden_size + 4 + 1
    assert (found.documents, found.done, found.mine, found.parts) == (COUNT, 0, COUNT, COUNT // BLOCK)
    assert found.most_tokens == found.tokens + 32 * COUNT
    assert found.most_bytes == found.most_tokens * per_token
    assert 0 < found.held_out < COUNT
    text = str(found)
    assert f"{per_token} bytes a token, through a V3 view" in text
    assert f"{COUNT} documents" in text
    assert not config.run.dir.exists()
    given = plan(changed(config, prompts__answers="given"))
    assert given.tokens == given.most_tokens


def test_plan_of_the_real_run_needs_neither_target_nor_prompts(tmp_path):
    real = Path(__file__).parent.parent / "configs/deepseek-v3.2.toml"
    found = plan(load_config([real], [f"run.dir={tmp_path}", f"target.path={tmp_path / 'absent'}"]))
    assert found.bytes_per_token == 2 * 7168 + 4 + 1
    assert found.documents is None
    assert "a million tokens take 14.3 GB" in str(found)
    assert list(tmp_path.iterdir()) == []


def test_plan_of_long_documents_takes_the_target_as_it_is(tmp_path):
    """Beyond index_topk a view without sparse attention would compute something else."""
    real = Path(__file__).parent.parent / "configs/deepseek-v3.2-long.toml"
    settings = [f"run.dir={tmp_path}", f"target.path={tmp_path / 'absent'}"]
    config = load_config([real], settings)
    assert config.prompts.max_length > 2048
    assert config.train.tokens_per_rank >= config.prompts.max_length
    assert plan(config).view == "native"
    with pytest.raises(ConfigError, match="more than index_topk = 2048"):
        plan(changed(config, dump__view="v3"))


def test_plan_of_an_eagle3_dump_counts_every_state_and_refuses_layers_that_are_not_there(tmp_path):
    real = Path(__file__).parent.parent / "configs/deepseek-v3.2-eagle3.toml"
    settings = [f"run.dir={tmp_path}", f"target.path={tmp_path / 'absent'}"]
    assert "57,344 of them states" in str(plan(load_config([real], settings)))
    with pytest.raises(ConfigError, match="the last of the target's 61 layers is 60"):
        plan(load_config([real], [*settings, "dump.aux_layers=[2, 61]"]))


def test_uids_say_what_a_document_is_and_follow_its_settings(config):
    first = prompts_of(config).documents
    for other in (
        changed(config, prompts__answers="given"),
        changed(config, prompts__max_answer_tokens=16),
        changed(config, prompts__temperature=0.5),
    ):
        assert not set(first.uids.tolist()) & set(prompts_of(other).documents.uids.tolist())
    same = changed(config, prompts__held_out=0.9, dump__block_documents=3)
    assert prompts_of(same).documents.uids.tolist() == first.uids.tolist()


def test_parts_hold_every_document_once_and_are_named_by_what_they_hold(config):
    documents = prompts_of(config).documents
    parts = list(cut(documents, np.arange(COUNT), BLOCK))
    assert [d.uid for p in parts for d in p.documents] == documents.uids.tolist()
    assert len({p.name for p in parts}) == COUNT // BLOCK
    assert [p.name for p in cut(documents, np.arange(COUNT), BLOCK)] == [p.name for p in parts]
    # what is left when some parts are done is cut as it was
    left = np.setdiff1d(np.arange(COUNT), np.arange(2 * BLOCK, 3 * BLOCK))
    assert [p.name for p in cut(documents, left, BLOCK)] == [p.name for i, p in enumerate(parts) if i != 2]


def test_workers_share_the_documents_out(config):
    uids = prompts_of(config).documents.uids
    shares = [own_share(uids, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(COUNT))
    assert [plan(changed(config, dump__worker=f"{k}/3")).mine for k in (1, 2, 3)] == [len(s) for s in shares]
    # a document stays with its worker, wherever its line stands
    moved = own_share(uids[::-1], "2/3")
    assert set(uids[::-1][moved].tolist()) == set(uids[shares[1]].tolist())


def test_documents_beyond_index_topk_are_refused_through_the_view(config, tiny_config):
    long = changed(config, prompts__max_length=tiny_config.index_topk + 1)
    for call in (plan, run):
        with pytest.raises(ConfigError, match=f"max_length = {tiny_config.index_topk + 1} .*index_topk = "):
            call(long)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves sparse attention")
def test_the_native_view_is_planned_anywhere_and_refused_where_it_would_run_without_a_gpu(config):
    native = changed(config, dump__view="native")
    assert plan(native).view == "native"
    assert plan(native).documents == COUNT
    with pytest.raises(ConfigError, match="no sparse attention without a GPU"):
        run(native)


def test_rejects_are_written_even_where_nothing_is_left(config):
    config.prompts.path.write_text('{"messages": [\n{"messages": []}\n')
    assert "no usable conversation (2 rejected" in str(plan(config))
    with pytest.raises(InputError, match=r"no usable conversation \(2 rejected; the first: line 1: not JSON"):
        run(config)
    rejects = (config.run.dir / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejects] == [1, 2]


def test_a_target_without_the_layer_is_refused_before_its_states_are_paid_for(config, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(config.target.path, bare)
    index = bare / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = f"model.layers.{json.loads((bare / 'config.json').read_text())['num_hidden_layers']}."
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if not k.startswith(last)}
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has no MTP layer"):
        plan(changed(config, target__path=bare))


def test_a_first_start_that_was_refused_does_not_freeze_its_settings(config, tmp_path, capsys):
    words = command(config, tmp_path / "run")[3:]
    assert main([*words, f"prompts.path={tmp_path / 'absent.jsonl'}"]) == 3
    assert "absent.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.dump.json").exists()


def test_a_file_in_place_of_the_run_directory_is_one_clear_error(config, tmp_path, capsys):
    words = command(config, tmp_path / "run")[3:]
    (tmp_path / "file").write_text("")
    assert main([*words, f"run.dir={tmp_path / 'file'}"]) == 3
    said = capsys.readouterr().err
    assert "error: cannot read" in said
    assert "Not a directory" in said


def test_missing_input_is_one_clear_error(config, tmp_path):
    with pytest.raises(InputError, match=r"no file of conversations .*absent\.jsonl"):
        run(changed(config, prompts__path=tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="no checkpoint at"):
        run(changed(config, target__path=tmp_path / "absent"))


def test_a_store_of_another_target_is_refused_before_an_engine_starts(config):
    agreed = contract(config, prompts_of(config), "v3").model_dump(mode="json")
    other = agreed | {"target": agreed["target"] | {"config_sha256": "0" * 64}}
    StoreWriter(config.store_path, other).discard()
    with pytest.raises(ContractError, match=r"target\.config_sha256"):
        run(config)
    assert not list(config.run.dir.glob("engine*"))


def test_probe_passes_rounding_and_a_few_router_choices_and_no_more():
    random = np.random.default_rng(0)
    first = torch.from_numpy(random.standard_normal((100, 1, 64)).astype(np.float32)).bfloat16()

    def bits(states: torch.Tensor) -> np.ndarray:
        return states.bfloat16().view(torch.uint16).numpy()

    near = first.float() * (1 + 0.005 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1)))
    check_states(bits(near), bits(first), "log")
    near[:5] = 0
    check_states(bits(near), bits(first), "log")
    with pytest.raises(CaptureError, match="median relative error"):
        check_states(bits(first * 1.1), bits(first), "log")
    with pytest.raises(CaptureError, match="100% of the tokens"):
        check_states(bits(first.roll(1, 0)), bits(first), "log")
    with pytest.raises(CaptureError, match="states"):
        check_states(bits(first[:50]), bits(first), "log")
    broken = first.clone()
    broken[:] = float("nan")
    with pytest.raises(CaptureError):
        check_states(bits(broken), bits(first), "log")


def command(config: RunConfig, run_dir: Path) -> list[str]:
    values = config.model_dump(mode="json", exclude_defaults=True)
    file = run_dir.with_suffix(".json")
    write_json(file, values | {"run": {"dir": str(run_dir)}})
    return [sys.executable, "-m", "pipeline", "dump", "--json", str(file)]


def parts_of(run_dir: Path) -> dict[str, int]:
    """Committed parts and when each was published."""
    parts = run_dir / "store" / "parts"
    return {
        p.parent.name: p.stat().st_mtime_ns for p in parts.glob("*/zarr.json") if "." not in p.parent.name
    }


def content(store) -> dict[int, tuple]:
    return {
        d.uid: (
            d.input_ids.tolist(),
            d.loss_mask.tolist(),
            d.held_out,
            d.hidden.view(torch.uint16).numpy().tobytes(),
        )
        for d in (store[i] for i in range(len(store)))
    }


def finish(config: RunConfig, run_dir: Path) -> dict:
    """Run a dump to its end; the result it prints."""
    done = subprocess.run(command(config, run_dir), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def start(config: RunConfig, run_dir: Path, parts: int) -> subprocess.Popen[str]:
    """Start a dump and return once so many parts are committed."""
    process = subprocess.Popen(
        command(config, run_dir), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while len(parts_of(run_dir)) < parts:
        assert process.poll() is None, (run_dir / "engine.1-of-1.log").read_text()[-3000:]
        time.sleep(0.005)
    return process


def assert_answers_follow_their_prompts(store, config: RunConfig) -> None:
    """Every document is the prompt, and an answer that is at most as long as it may be."""
    asked = {d.uid: d for d in prompts_of(config).documents}
    assert set(asked) == set(content(store))
    for document in (store[i] for i in range(len(store))):
        prompt = asked[document.uid]
        first, length = len(prompt.input_ids), len(document.input_ids)
        assert document.input_ids[:first].tolist() == prompt.input_ids.tolist()
        assert 0 < length - first <= 32
        assert document.loss_mask.tolist() == [j >= first for j in range(length)]
        assert document.held_out == is_held_out(uid_group(document.uid), 0.2, config.run.seed)
        assert len(document.hidden) == length


@pytest.mark.engine
def test_killed_and_started_again_it_gives_the_store_of_an_undisturbed_run(config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with open(config.prompts.path, "a") as file:
        file.write('{"messages": [\n')
    summary = finish(config, whole)
    assert (summary["documents"], summary["rejects"], summary["kept_documents"]) == (COUNT, 1, 0)
    assert json.loads((whole / "dump.json").read_text()) == summary
    assert BLOCK / COUNT <= summary["occupancy"] <= 1
    assert [json.loads(x)["line"] for x in (whole / "rejects.jsonl").read_text().splitlines()] == [COUNT + 1]

    with start(config, killed, parts=3) as process:
        engines = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(engines, timeout=30)
    assert not alive, "the engine outlives the process that started it"
    before = parts_of(killed)
    assert 3 <= len(before) < COUNT // BLOCK
    # what a kill in the middle of writing leaves behind
    other = next(n for n in parts_of(whole) if n not in before)
    (killed / "store" / "parts" / f"{other}.deadbeef" / "hidden").mkdir(parents=True)

    # this time only the engine dies: a new one takes over the part
    with start(config, killed, parts=len(before) + 1) as process:
        children = psutil.Process(process.pid).children()
        (engine,) = (p for p in children if any("spawn_main" in word for word in p.cmdline()))
        engine.kill()
        out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    assert f"{len(before) * BLOCK} of {COUNT} documents are in the store already" in err
    assert "1 open parts failed and are taken again: the engine ended (exit code -9)" in " ".join(err.split())
    again, after = json.loads(out), parts_of(killed)
    # the part that was committed as the engine died may count as found there
    assert again["kept_documents"] in (len(before) * BLOCK, (len(before) + 1) * BLOCK)
    assert again["kept_documents"] + again["captured_documents"] == COUNT
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted(p.name for p in (killed / "store" / "parts").iterdir())
    assert sorted(after) == sorted(parts_of(whole))

    a, b = open_store(whole / "store"), open_store(killed / "store")
    assert a.verify() == b.verify() == []
    assert a.contract == b.contract
    assert content(a) == content(b)
    for figure in ("documents", "tokens", "loss_tokens", "bytes"):
        assert summary[figure] == again[figure]
    assert_answers_follow_their_prompts(a, config)

    # nothing left to do: no engine, the same store
    log = (killed / "engine.1-of-1.log").stat().st_size
    third = finish(config, killed)
    assert (third["captured_documents"], third["manifest"]) == (0, again["manifest"])
    assert (killed / "engine.1-of-1.log").stat().st_size == log
