"""Settings: files, overrides, typos, and what a run directory remembers."""

from pathlib import Path

import pytest

from configs.engine_keys import check_keys
from configs.errors import ConfigError
from configs.load import freeze, load_config, settings
from configs.lock import hold
from configs.schema import OWNED, RunConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_committed_file_loads(path):
    config = load_config([path])
    assert config.target.path is not None
    assert config.prompts.path is not None


def test_defaults_then_files_then_overrides(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text(
        "[train]\nlearning_rate = 1e-3\nnum_steps = 2\n[dump.vllm]\nmax_num_seqs = 8\nseed_x = 1\n"
    )
    second.write_text("[train]\nnum_steps = 4\n[dump.vllm]\nmax_num_seqs = 16\n")
    config = load_config(
        [first, second], ["train.learning_rate=3e-4", "dump.view=v3", "train.freeze=['eh_proj.']"]
    )
    assert config.train.learning_rate == 3e-4  # a float, not a string
    assert config.train.num_steps == 4
    assert config.dump.view == "v3"
    assert config.train.freeze == ("eh_proj.",)
    assert config.dump.vllm == {"max_num_seqs": 16, "seed_x": 1}
    assert config.train.epochs == RunConfig().train.epochs


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "train.learning_rate"),
        ("trian.learning_rate=1", "train"),
        ("dump.stroe=x", "dump.store"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(override, expected):
    with pytest.raises(ConfigError, match="unknown key") as error:
        load_config([], [override])
    assert error.value.hint == f"did you mean {expected}?"
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_steps=0", ["train.num_steps", "0"]),
        ("train.loss=mse", ["train.loss", "mse"]),
        ("dump.worker=3/2", ["dump.worker", "3/2"]),
        ('verify.drafts=["trained","a","a"]', ["verify.drafts", "'a' twice"]),
        ('serve.bench_drafts=["none","trained","none"]', ["serve.bench_drafts", "'none' twice"]),
        ("dump.worker=x", ["dump.worker", "x"]),
        ("prompts.max_answer_tokens=4096", ["max_answer_tokens", "max_length"]),
        ("train.learning_rate=nan", ["train.learning_rate"]),
        ("learning_rate=1", ["not an override"]),
        ("train.learning_rate", ["not an override"]),
    ],
)
def test_wrong_value_is_one_clear_error(override, words):
    with pytest.raises(ConfigError) as error:
        load_config([], [override])
    assert all(word in error.value.message for word in words)


@pytest.mark.parametrize("name", [f"{table}.{key}" for table, keys in OWNED.items() for key in sorted(keys)])
def test_keys_decided_elsewhere_cannot_be_passed_through(name):
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        load_config([], [f"{name}=1"])


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config([tmp_path / "nowhere.toml"])
    bad = tmp_path / "bad.toml"
    bad.write_text("[train\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config([bad])


def test_every_key_has_help():
    assert [f"{section}.{key}" for section, key, _, text, _ in settings() if not text] == []


@pytest.mark.parametrize("text", ["{", "[]", '{"train": 1}'])
def test_damaged_settings_of_a_run_are_named(tmp_path, text):
    config = load_config([], [f"run.dir={tmp_path}"])
    path = freeze(config, "train", ("train",))
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.train\.json"):
        freeze(config, "train", ("train",))
    with pytest.raises(ConfigError, match=r"config\.train\.json"):
        load_config([path])


def test_a_run_directory_is_held_by_one_process(tmp_path):
    def held():
        return hold(tmp_path / "run" / ".x.lock", "another export", "wait for it")

    with (
        held(),
        pytest.raises(ConfigError, match=r"another export is running in .*\nhint: wait for it"),
        held(),
    ):
        pass
    with held():
        pass


def test_run_directory_refuses_other_settings_and_lists_them(tmp_path):
    base = [f"run.dir={tmp_path}"]
    freeze(load_config([], [*base, "train.num_steps=2"]), "train", ["train"])
    # how the work is done may change, and so may another stage's settings
    freeze(load_config([], [*base, "train.num_steps=2", "train.ranks=4", "dump.view=v3"]), "train", ["train"])
    with pytest.raises(
        ConfigError, match=r"train\.num_steps was 2, now 3.*train\.loss was 'kl', now 'ce'"
    ) as error:
        freeze(load_config([], [*base, "train.num_steps=3", "train.loss=ce"]), "train", ["train"])
    assert error.value.exit_code == 2
    assert load_config([tmp_path / "config.train.json"]).train.num_steps == 2


def test_null_undoes_a_setting_of_a_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[prompts]\nlimit = 800\n[train]\nmax_steps = 'null'\n")
    assert load_config([file]).prompts.limit == 800
    for word in ("null", "none"):
        config = load_config([file], [f"prompts.limit={word}", f"export.dir={word}"])
        assert (config.prompts.limit, config.export.dir, config.train.max_steps) == (None, None, None)
    # where nothing is no choice, it is a word like any other
    assert load_config([], ["serve.draft=none"]).serve.draft == "none"


def test_an_error_names_the_file_or_the_command_line_that_holds_the_key(tmp_path):
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[train]\nnum_steps = 3\n")
    second.write_text("[train]\nnum_steps = 99\nwarmup_steps = 1\n")
    with pytest.raises(ConfigError) as error:
        load_config([first, second], ["train.epochs=2"])
    assert str(second) in error.value.message
    assert str(first) not in error.value.message
    assert "command line" not in error.value.message
    with pytest.raises(ConfigError, match="in the command line"):
        load_config([first], ["train.num_steps=99"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.freeze=3", "expected a list, got 3"),
        ("train.max_steps=1.5", "expected a whole number, got 1.5"),
        ("train.mask_position_0=maybe", "expected true or false, got 'maybe'"),
        ("dump.vllm=3", "expected a table, got 3"),
        ("prompts.path=3", "expected a path or a list, got 3"),
        ("verify.max_tokens=1", "expected greater than or equal to 2, got 1"),
        ("train.loss=mse", "expected 'kl', 'ce'"),
    ],
)
def test_a_wrong_value_is_explained_in_plain_words(override, said):
    with pytest.raises(ConfigError) as error:
        load_config([], [override])
    assert said in error.value.message
    assert error.value.message.count(override.partition("=")[0]) == 1
    assert not any(word in error.value.message for word in ("Input", "valid", "tuple", "dict"))


def test_a_key_without_its_section_is_told_where_it_belongs(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config([], ["max_steps=4"])
    assert "train.max_steps=4" in error.value.hint
    file = tmp_path / "a.toml"
    file.write_text("max_steps = 4\n")
    with pytest.raises(ConfigError) as error:
        load_config([file])
    assert error.value.hint == "did you mean train.max_steps?"


def test_one_place_may_be_written_in_several_ways(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    words = [f"run.dir={tmp_path / 'run'}"]
    freeze(load_config([], [*words, "target.path=target"]), "train", ["target", "train"])
    monkeypatch.chdir("/")
    for same in (tmp_path / "target", tmp_path / "x" / ".." / "target", tmp_path / "link"):
        freeze(load_config([], [*words, f"target.path={same}"]), "train", ["target", "train"])
    with pytest.raises(ConfigError, match=r"target\.path was"):
        freeze(load_config([], [*words, f"target.path={tmp_path}"]), "train", ["target", "train"])


def test_a_comparison_of_settings_alone_writes_nothing(tmp_path):
    config = load_config([], [f"run.dir={tmp_path / 'run'}"])
    freeze(config, "train", ("train",), write=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "override", "near"),
    [
        ("dump", "dump.vllm.max_num_seq=8", "dump.vllm.max_num_seqs"),
        ("verify", "verify.vllm.gpu_memory_utilisation=0.5", "verify.vllm.gpu_memory_utilization"),
        ("train", "train.deepspeed.wall_clock_breakdwn=true", "train.deepspeed.wall_clock_breakdown"),
        (
            "train",
            "train.deepspeed.zero_optimization.reduce_bucket=1",
            "train.deepspeed.zero_optimization.reduce_bucket_size",
        ),
    ],
)
def test_a_key_that_the_engine_does_not_know_is_refused_before_it_starts(verb, override, near):
    with pytest.raises(ConfigError, match="has no such setting") as error:
        check_keys(load_config([], [override]), verb)
    assert error.value.hint == f"did you mean {near}?"
    value = override.partition("=")[2]
    check_keys(load_config([], [f"{near}={value}"]), verb)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
@pytest.mark.parametrize("verb", ["dump", "train", "verify"])
def test_the_engines_know_every_key_of_the_committed_files(path, verb):
    check_keys(load_config([path]), verb)
