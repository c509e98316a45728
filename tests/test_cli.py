"""The command line: help, exit codes, one clear message and never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from configs.load import settings
from pipeline.__main__ import main
from tests.stores import write_store


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "verb", ["target", "dump", "train", "evaluate", "export", "verify", "serve", "bench-serve", "demo"]
)
def test_help_lists_every_setting_of_the_verb_with_its_default(capsys, verb):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    section = {"target": "tiny", "demo": "tiny"}.get(verb, verb)
    for name, key, default, _, _ in settings():
        if name == section:
            assert f"{name}.{key} = {json.dumps(default, default=str)}" in text


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["dump", "--dry-run", "dump.stroe=x"], 2, ["dump.stroe", "did you mean dump.store?"]),
        (["train", "nowhere.toml"], 2, ["nowhere.toml", "configs/ holds"]),
        (["fly"], 2, ["fly", "--help"]),
        (["dump", "--dri-run"], 2, ["--dri-run"]),
        (["train", "--dry-run"], 2, ["target.path"]),
        (["train", "--dry-run", "run.dir=eagle-runs/x"], 2, ["'eagle'", "set export.dir"]),
        (["train", "target.path=nowhere", "run.dir=nowhere/run"], 3, ["nowhere"]),
        (["export", "target.path=nowhere"], 3, ["nowhere"]),
        (["train", f"target.path={__file__}"], 3, ["is a file, not a checkpoint directory"]),
        (["store", "info", "nowhere"], 3, ["nowhere"]),
        (["store", "verify", "nowhere"], 3, ["nowhere"]),
        (["report", "nowhere"], 3, ["nowhere"]),
    ],
)
def test_wrong_usage_and_input(capsys, tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(capsys, *words)
    assert found == code
    flat = " ".join(err.split())
    assert all(text in flat for text in said)
    assert list(tmp_path.iterdir()) == []


def test_make_passes_run_directories_of_any_name():
    command = ["make", "-n", "train", "report", "RUN=runs/a b", "DEVICE=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert """'run.dir="runs/a b"'""" in done.stdout
    assert 'report "runs/a b"' in done.stdout


@pytest.mark.parametrize("name", ["verify.json", "serving.json", "evaluate.best.json", "summary.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"before": 1, "after": 2}'])
def test_a_damaged_result_is_named_in_the_report(capsys, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 3
    assert f"{tmp_path / name} is damaged" in " ".join(err.split())
    assert "remove" not in err


def test_lines_that_are_no_metrics_do_not_stop_a_report(capsys, tmp_path):
    good = '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(b"5\n" + good.encode() + b'\xff\xfe{\n{"a": 1}\n{"step": 3')
    code, _, err = run(capsys, "report", str(tmp_path))
    assert code == 0, err
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_directory_that_cannot_be_made_is_named(capsys, tiny_checkpoint, tmp_path):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", "export.checkpoint=released"]
    code, _, err = run(capsys, "export", *words, "export.dir=/proc/nope")
    assert code == 1
    assert "error: /proc/" in err


def test_a_result_is_a_line_or_the_whole_as_json(capsys, tiny_checkpoint, tmp_path):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", "export.checkpoint=released"]
    code, out, _ = run(capsys, "export", *words)
    assert code == 0
    assert len(out.splitlines()) == 1
    assert str(tmp_path / "nextn") in out
    code, out, err = run(capsys, "export", "--json", *words)
    assert code == 0
    assert json.loads(out)["reused"] is True
    assert "all its bytes are right" in " ".join(err.split())


def test_a_dry_run_fails_where_the_run_would(capsys, tiny_checkpoint, tmp_path):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", "export.checkpoint=released"]
    assert run(capsys, "export", *words)[0] == 0
    for changed, code, said in (
        (["run.seed=9"], 2, "run.seed was 0, now 9"),
        (["export.checkpoint=lst"], 3, "no checkpoint lst"),
        (["export.layout=stitched"], 3, "holds another export"),
    ):
        found, _, err = run(capsys, "export", "--dry-run", *words, *changed)
        assert (found, said in " ".join(err.split())) == (code, True), err
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"no": 1}\n{"no": 2}\n')
    for verb in ("dump", "verify", "bench-serve", "demo"):
        for path in ("/nowhere.jsonl", empty):
            found, _, err = run(capsys, verb, "--dry-run", *words, f"prompts.path={path}")
            assert (found, str(path) in "".join(err.split())) == (3, True), err
    assert run(capsys, "serve", "--dry-run", *words, "export.dir=/no/nextn")[0] == 3


def test_settings_that_a_server_does_not_take_are_refused_when_planning(capsys, tiny_checkpoint, tmp_path):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", "serve.draft=none"]
    for setting, said in (
        ("max_modl_len=8", "did you mean serve.vllm.max_model_len?"),
        ("max_model_len='8k'", "expected a whole number of tokens"),
    ):
        code, _, err = run(capsys, "serve", "--dry-run", *words, f"serve.vllm.{setting}")
        assert (code, said in " ".join(err.split())) == (2, True), err
    known = ["max_num_seqs=4", "api_key='x'", "ssl_keyfile='k'", "enable_log_requests=true"]
    assert run(capsys, "serve", "--dry-run", *words, *(f"serve.vllm.{k}" for k in known))[0] == 0


@pytest.mark.parametrize("named", ["[]", "null"])
def test_a_draft_whose_configuration_names_no_architecture_is_refused(
    capsys, tiny_checkpoint, tmp_path, named
):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}"]
    assert run(capsys, "export", *words, "export.checkpoint=released")[0] == 0
    config, manifest = tmp_path / "nextn" / "config.json", tmp_path / "nextn" / "layer61.json"
    said = json.loads(config.read_text())
    manifest.unlink()
    config.write_text(json.dumps(said | {"architectures": json.loads(named)}))
    code, _, err = run(capsys, "serve", *words, "serve.draft=trained")
    assert code == 3, err


@pytest.mark.parametrize("size", [None, "x"])
def test_half_of_a_launchers_environment_is_refused(capsys, tiny_checkpoint, tmp_path, monkeypatch, size):
    monkeypatch.setenv("RANK", "0")
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    code, _, err = run(capsys, "train", f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}")
    assert (code, "WORLD_SIZE" in err) == (2, True), err


def test_an_error_that_all_ranks_share_is_said_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run([*command, "-m", "pipeline", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode
    assert done.stderr.count("error: argument VERB") == 1, done.stderr
    assert "Traceback" not in done.stderr.partition("torch/distributed")[0]


@pytest.mark.parametrize("verb", ["export", "evaluate"])
def test_an_empty_name_of_a_checkpoint_is_refused_with_what_there_is(capsys, tiny_checkpoint, tmp_path, verb):
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", f"{verb}.checkpoint=''"]
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 8)
    code, _, err = run(capsys, verb, *words, f"train.store={store}")
    assert (code, "checkpoint is empty" in err, "hint: run layer61 train" in err) == (3, True, True), err


def test_a_file_in_the_place_of_the_checkpoints_is_named_before_training(capsys, tiny_checkpoint, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    code, _, err = run(capsys, "train", f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}")
    assert (code, "checkpoints is a file" in " ".join(err.split())) == (3, True), err


def test_a_dry_run_says_why_conversations_are_rejected(capsys, tiny_checkpoint, tmp_path):
    good = '{"messages": [{"role": "user", "content": "a"}]}\n'
    (tmp_path / "c.jsonl").write_text(good + '{"messages": []}\n{"no": 1}\n{"no": 2}\n')
    words = [f"target.path={tiny_checkpoint}", f"run.dir={tmp_path}", f"prompts.path={tmp_path / 'c.jsonl'}"]
    code, _, err = run(capsys, "dump", "--dry-run", *words)
    assert code == 0
    assert "2 rejected: " in err
    assert err.index("2 rejected: ") < err.index("1 rejected: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wait_s", [0.15, 0.6, 1.5])
def test_a_signal_at_any_moment_ends_quietly_also_where_the_shell_ignores_it(tmp_path, number, wait_s):
    words = ["configs/deepseek-v3.2.toml", f"run.dir={tmp_path}", "--dry-run"]
    command = [sys.executable, "-c", WAITING, *words]
    ignoring = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    shell = [sys.executable, "-c", f"{ignoring}; os.execv(sys.argv[1], sys.argv[1:])"]
    process = subprocess.Popen([*shell, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    time.sleep(wait_s)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert b"the same command continues" in err
    assert b"Traceback" not in err
    assert b"Warning" not in err


# a verb that plans without end, as far from its first import as the signal comes
WAITING = """
import signal, sys
from pipeline import __main__ as program
installed = signal.signal
def once(*words):
    signal.signal = installed
    found = installed(*words)
    installed(signal.SIGTERM, program._raise)
    print("begun", flush=True)
    return found
signal.signal = once
import time
while not (code := program.main(["train", *sys.argv[1:]])) or code < 128:
    pass
sys.exit(code)
"""


def test_text_that_a_terminal_cannot_show_is_escaped(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[12])
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "pipeline", "store", "show", str(store), "--tokenizer"]
    done = subprocess.run([*command, str(tiny_checkpoint)], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"in brackets: tokens the target has to produce" in done.stdout
    assert b"[" in done.stdout.rsplit(b"produce", 1)[1]


@pytest.mark.parametrize(
    "verb", ["dump", "train", "export", "evaluate", "verify", "serve", "bench-serve", "demo"]
)
def test_dry_run_of_the_real_configuration_needs_no_model(capsys, verb, tmp_path):
    """On a machine that has neither the checkpoint nor the conversations."""
    words = [f"run.dir={tmp_path / 'run'}", f"prompts.path={tmp_path / 'none.jsonl'}"]
    code, _, err = run(capsys, verb, "configs/deepseek-v3.2.toml", "--dry-run", *words)
    assert code == 0, err
    assert "error" not in err
    said = {
        "dump": ["14,341 bytes a token", "is not on this machine"],
        "demo": ["14,341 bytes a token"],
        "verify": ["not yet: there is no"],
        "serve": ["not yet: there is no"],
        "bench-serve": ["not yet: there is no"],
        "train": ["11,608,", "GiB", "steps"],
        "export": ["fp8"],
        "evaluate": ["no store"],
    }[verb]
    assert all(text in err for text in said), err
    assert not (tmp_path / "run").exists()
