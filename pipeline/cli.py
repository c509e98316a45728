"""Verbs and nothing else: parse, call the stage, turn errors into exit codes."""

import argparse
import errno
import functools
import io
import itertools
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TextIO

from configs import run_dir
from configs.engine_keys import check_keys
from configs.errors import ConfigError, InputError, Layer61Error, StoreError
from configs.importing import importing
from configs.load import freeze, load_config, settings
from configs.lock import hold
from configs.progress import log, say
from configs.schema import RunConfig
from configs.target import target_config
from pipeline.brief import brief

__all__ = ["run"]

# what a launcher takes to see that a rank has ended, and to end the others
FIRST_RANK_S = 5.0
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 bad configuration or usage, 3 input does not match, 130/143 interrupted"
)


def _keys(*sections: str) -> str:
    """The `--help` table of the settings of some sections, every key with its default."""
    lines = []
    for section, key, default, text, free in settings():
        if section in sections:
            shown = json.dumps(default, default=str)
            note = " (may change between starts)" if free else ""
            lines.append(f"  {section}.{key} = {shown}")
            lines += textwrap.wrap(text + note, 96, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors look like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, f"{self.prog} --help explains")


def _say(stage: str, lines: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in lines.splitlines():
            log(stage, line)


def _target(args: argparse.Namespace) -> int:
    with importing():
        from pipeline.tiny import target

    config = load_config(args.config, args.overrides)
    directory = args.directory or config.target.path
    if directory is None:
        raise ConfigError("no directory to build the target in", "layer61 target DIR, or set target.path")
    _say("target", target.dry_run(config.tiny))
    if not args.dry_run:
        target.build_target(directory, config.tiny, config.run.seed, config.prompts)
    return 0


def _stage(
    args: argparse.Namespace,
    sections: Sequence[str],
    plan: Callable[[RunConfig], Any],
    run: Callable[[RunConfig], Any],
    ready: Callable[[RunConfig], Any] = lambda config: None,
) -> int:
    """Say what will be done, keep the settings in the run directory, do it, say what came of it.

    A dry run ends with the error that the run would end with: what `ready` raises, or what the plan says is
    missing. Where the target is not on this machine it can only plan, by the sizes of the released one.
    """
    config = load_config(args.config, args.overrides)
    freeze(config, args.verb, sections, write=False)
    check_keys(config, args.verb)
    planned = plan(config)
    _say(args.verb, str(planned))
    if args.dry_run and not config.require_target().exists():
        return 0
    target_config(config.require_target())
    if args.dry_run:
        if missing := getattr(planned, "missing", ""):
            raise InputError(missing, "the run would stop here")
        ready(config)
        return 0
    started = time.monotonic()
    with _alone(config, args.verb):
        first = not run_dir.settings(config.run.dir, args.verb).exists()
        kept = freeze(config, args.verb, sections)
        try:
            result = run(config)
        except (ConfigError, InputError):
            # a first start that was refused must not freeze its settings
            if first:
                kept.unlink(missing_ok=True)
            raise
    if result is not None:
        text = json.dumps(result, indent=2, default=str) if args.json else brief(args.verb, result)
        if text:
            print(text, flush=True)  # noqa: T201 - results go to stdout
    log(args.verb, f"done in {time.monotonic() - started:.0f} s")
    return 0


def _alone(config: RunConfig, verb: str) -> AbstractContextManager[None]:
    """Keep a second process of a verb out of the run directory; dump and train see to it themselves."""
    if verb in ("dump", "train") or os.environ.get("RANK", "0") != "0":
        return nullcontext()
    hint = "wait for it, or choose another run directory (RUN=... or run.dir=...)"
    return hold(run_dir.verb_lock(config.run.dir, verb), f"another {verb}", hint)


def _dump(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import dump, recompute

    if args.check is not None:
        if args.dry_run:
            raise ConfigError("--check computes and has no dry run", "leave out --dry-run")
        config = load_config(args.config, args.overrides)
        check_keys(config, "dump")
        result = recompute.check(config, args.check)
        if args.json:
            console_out(json.dumps(result, indent=2))
        return 0
    return _stage(args, ("target", "prompts", "dump"), dump.plan, dump.run)


def _train(args: argparse.Namespace) -> int:
    with importing():
        from train import launch
        from train.batch import open_split

    return _stage(args, ("target", "train", "eagle3"), launch.plan, launch.run, open_split)


def _evaluate(args: argparse.Namespace) -> int:
    with importing():
        from train import evaluate

    return _stage(args, ("target",), evaluate.plan, evaluate.run, evaluate.ready)


def _export(args: argparse.Namespace) -> int:
    with importing():
        from export import draft
        from train import vocabulary

    def run(config: RunConfig) -> dict[str, Any]:
        return draft.run(config, lambda size: vocabulary.choose(config, size))

    return _stage(args, ("target",), draft.plan, run, draft.ready)


def _verify(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import verify

    return _stage(args, ("target", "prompts"), verify.plan, verify.run, verify.ready)


def _serve(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import serve

    return _stage(args, ("target",), serve.plan, serve.run, serve.ready)


def _bench_serve(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import bench_serve

    return _stage(args, ("target", "prompts"), bench_serve.plan, bench_serve.run, bench_serve.ready)


def _demo(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import demo

    return demo.run(args.config, args.overrides, dry_run=args.dry_run)


def _report(args: argparse.Namespace) -> int:
    with importing():
        from pipeline import report

    path = report.write(args.run)
    log("report", f"wrote {path}")
    return 0


def _store(args: argparse.Namespace) -> int:
    with importing():
        import featurestore

    if args.action == "info":
        found = featurestore.info(args.store)
        console_out(json.dumps(found, indent=2) if args.json else featurestore.render_info(found))
        return 0
    if args.action == "verify":
        report = featurestore.verify(args.store, repair=args.repair)
        console_out(featurestore.render_report(report))
        # a repaired store is whole again, though smaller
        return 0 if not report.problems or report.published is not None else StoreError.exit_code
    decode = None
    if args.tokenizer is not None:
        from tokenizers import Tokenizer

        file = args.tokenizer / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{args.tokenizer} has no tokenizer.json", "name the directory of the target")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library has no class of its own for it
            raise InputError(
                f"{file} is no tokenizer: {error}", "name the directory of the target"
            ) from error
        decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    found = featurestore.show(args.store, args.document, decode)
    console_out(featurestore.render_show(found, brackets=not sys.stdout.isatty()))
    return 0


def console_out(thing: Any) -> None:
    """Print text or a rich renderable to stdout; what a store holds is never taken for markup."""
    from rich.console import Console

    soft = not sys.stdout.isatty()
    Console(soft_wrap=soft, markup=False, emoji=False, highlight=False).print(thing)


VERBS: dict[str, tuple[Callable[[argparse.Namespace], int], str, tuple[str, ...]]] = {
    "dump": (_dump, "stage one: conversations to stored hidden states", ("run", "target", "prompts", "dump")),
    "train": (_train, "stage two: train a draft from the store", ("run", "target", "train", "eagle3")),
    "evaluate": (_evaluate, "offline acceptance of a checkpoint", ("run", "target", "train", "evaluate")),
    "export": (_export, "write the directory that servers load", ("run", "target", "export")),
    "verify": (_verify, "serve target and draft in vLLM, measure acceptance", ("run", "target", "verify")),
    "serve": (
        _serve,
        "vLLM's OpenAI server with the draft, acceptance shown live",
        ("run", "target", "serve"),
    ),
    "bench-serve": (
        _bench_serve,
        "speed over HTTP with and without drafts, at several concurrencies",
        ("run", "target", "prompts", "serve"),
    ),
    "demo": (_demo, "every stage with the tiny target, and a table at the end", ("run", "tiny")),
}


def _parser() -> Parser:
    parser = Parser(
        prog="layer61",
        description="Train DeepSeek-V3.2's multi-token-prediction layer offline.",
        epilog=EXIT_CODES,
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    def add(name: str, text: str, sections: tuple[str, ...]) -> Parser:
        return verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"settings of this verb, with their defaults:\n{_keys(*sections)}\n\n{EXIT_CODES}"
            if sections
            else EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_config(verb: Parser) -> None:
        verb.add_argument(
            "arguments",
            nargs="*",
            metavar="CONFIG or section.key=value",
            help="TOML files, later ones win, then overrides in TOML grammar",
        )
        verb.add_argument(
            "--dry-run", action="store_true", help="say what would be done, with sizes, and stop"
        )
        verb.add_argument("--json", action="store_true", help="print the whole result as JSON")

    verb = add("target", "build and train the tiny V3.2-shaped target", ("run", "target", "tiny"))
    verb.add_argument("arguments", nargs="*", metavar="DIR, CONFIG or section.key=value")
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, with sizes, and stop")
    verb.set_defaults(call=_target)
    for name, (call, text, sections) in VERBS.items():
        verb = add(name, text, sections)
        add_config(verb)
        if name == "dump":
            verb.add_argument(
                "--check",
                type=_documents,
                metavar="N",
                help="capture nothing: compute N documents of the store again with the other engine, and end"
                " with exit code 3 where the states differ by more than rounding explains",
            )
        verb.set_defaults(call=call)

    verb = add("store", "look at a feature store", ())
    actions = verb.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    action = actions.add_parser("info", help="totals, lengths, sources, contract, lossless bound")
    action.add_argument("store")
    action.add_argument("--json", action="store_true", help="print the figures as JSON")
    action = actions.add_parser("verify", help="check every byte")
    action.add_argument("store")
    action.add_argument(
        "--repair", action="store_true", help="quarantine bad parts, publish a manifest without them"
    )
    action = actions.add_parser("show", help="one document: text, mask, norms of the states")
    action.add_argument("store")
    action.add_argument("document", nargs="?", type=int, default=0, help="uid, or place from 0")
    action.add_argument("--tokenizer", type=Path, help="directory of the target, to show text")
    verb.set_defaults(call=_store)

    verb = add("report", "write one self-contained HTML page about a run", ())
    verb.add_argument("run", type=Path, help="run directory")
    verb.set_defaults(call=_report)
    return parser


def _options_first(words: list[str]) -> list[str]:
    """Options before all else, each with its value."""
    options, rest, left = [], [], iter(words)
    for word in left:
        if not word.startswith("-"):
            rest.append(word)
        else:
            options += [word, *itertools.islice(left, 1)] if word == "--check" else [word]
    return [*options, *rest]


def _documents(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of documents, not {text!r}")
    return int(text)


def _split(args: argparse.Namespace) -> None:
    """Tell configuration files, overrides and the target's directory apart."""
    args.config, args.overrides, args.directory = [], [], None
    for text in args.arguments:
        if "=" in text:
            args.overrides.append(text)
        elif args.verb == "target" and not text.endswith((".toml", ".json")):
            args.directory = Path(text)
        else:
            args.config.append(text)


def _plain(stream: TextIO) -> None:
    """Write what the terminal's encoding lacks as an escape instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def _leave_to_first_rank() -> None:
    """Let an error that all ranks of a machine share be said once.

    As the first of them ends, the launcher ends the others, in silence: they wait for it. One that waits in
    vain has an error of its own.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(FIRST_RANK_S)


def run(words: list[str]) -> int:
    """Run one verb and return its exit code; errors are one message, with what to do next."""
    _plain(sys.stdout)
    _plain(sys.stderr)
    verb = words[0] if words and words[0] in (*VERBS, "target") else "VERB"
    try:
        if verb != "VERB":
            # argparse takes options between positional arguments only here
            words = [words[0], *_options_first(words[1:])]
        args = _parser().parse_args(words)
        if hasattr(args, "arguments"):
            _split(args)
        return args.call(args)
    except Layer61Error as error:
        _leave_to_first_rank()
        say(f"error: {error.message}", style="red")
        if error.hint:
            say(f"hint: {error.hint.replace('layer61 VERB', f'layer61 {verb}')}")
        return error.exit_code
    except BrokenPipeError:
        # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        place = error.filename or "the disk"
        hint = "make room" if error.errno in DISK_FULL else "check the path and its permissions"
        say(f"error: {place}: {error.strerror}", style="red")
        say(f"hint: {hint}, then start again")
        return 1
