"""Write the sample conversations: questions about Python's standard library, answered from its own text.

    python -m data.make_conversations [--output data/conversations.jsonl]

Signatures, documentation strings, doctest examples and source lines are read from the running interpreter;
the sentences around them come from the templates below. Every choice is made by a hash of what it is about,
so the same Python gives the same file.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.files import atomic_write

# fmt: off
MODULES = tuple("""
abc argparse ast base64 bisect calendar cmath codecs collections collections.abc colorsys
concurrent.futures configparser contextlib copy csv dataclasses datetime decimal difflib dis enum filecmp
fileinput fnmatch fractions functools getpass glob graphlib gzip hashlib heapq hmac html html.parser
http.client http.cookies inspect io ipaddress itertools json keyword linecache logging math mimetypes
numbers operator os os.path pathlib pickle platform pprint queue random re reprlib sched secrets shelve
shlex shutil socket sqlite3 stat statistics string struct subprocess tarfile tempfile textwrap threading
time timeit tokenize traceback types typing unicodedata unittest urllib.parse urllib.request uuid
warnings wave weakref xml.etree.ElementTree zipfile zlib
""".split())  # noqa: SIM905
# fmt: on
BUILTIN_TYPES = (str, bytes, list, dict, set, tuple, int, float, range, frozenset, bytearray, complex)

NAMES = 420  # beside all the modules
VARIANTS = 3  # conversations about one name
LONGEST_ANSWER = 900  # characters
LONGEST_CONVERSATION = 3000

SYSTEMS = (
    "You answer questions about Python's standard library.",
    "You are a helpful assistant. Answer questions about Python briefly and exactly.",
    "You are a Python tutor. Show code where it helps.",
    "Answer from the documentation of Python's standard library.",
)
# text that names people or leads off the machine is left out
PRIVATE = re.compile(
    r"@\w|https?://|www\.|\b(author|copyright|written by|contributed|maintain)", re.IGNORECASE
)


@dataclass(frozen=True)
class Member:
    """One documented name: a module, class, exception, function or method."""

    kind: str
    module: str
    name: str  # as one would write it: "shutil.copy2", "str.upper"
    value: Any
    doc: str  # first paragraphs
    summary: str  # first sentence, one line
    signature: str  # "(src, dst)", empty where there is none


def pick(options: Sequence[Any], *about: object) -> Any:
    """One of the options, fixed by a hash of `about`."""
    digest = hashlib.sha256("\0".join(map(str, about)).encode()).digest()
    return options[int.from_bytes(digest[:8], "big") % len(options)]


def documentation(value: Any) -> str:
    """The documentation string, cleaned; empty where there is none of its own."""
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc).expandtabs(4) if isinstance(doc, str) else ""


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a documentation string that can be quoted."""
    blocks = [b.strip("\n") for b in re.split(r"\n\s*\n", text) if b.strip()]
    return [b for b in blocks if not PRIVATE.search(b) and not re.match(r"[-=*#~ ]+$", b)]


def quoted(blocks: list[str], limit: int = 520) -> str:
    """As many leading paragraphs as fit the limit; a long first one is cut after a sentence."""
    if not blocks:
        return ""
    if len(blocks[0]) > limit:
        return blocks[0][:limit].rpartition(". ")[0] + "." if ". " in blocks[0][:limit] else ""
    text = blocks[0]
    for block in blocks[1:]:
        if len(text) + len(block) + 2 > limit:
            break
        text += "\n\n" + block
    return text


def signature_of(value: Any) -> str:
    """The signature as text, without addresses and annotations; empty where Python knows none."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    bare = [p for p in bare if p.name not in ("self", "cls")]
    try:
        text = str(inspect.Signature(bare))
    except ValueError:
        return ""
    # a class that says "()" takes its arguments in a way Python cannot tell
    unknown = "<" in text or len(text) > 160 or (text == "()" and isinstance(value, type))
    return "" if unknown else text


def member(kind: str, module: str, name: str, value: Any) -> Member | None:
    """Describe a name, or None where its documentation says too little."""
    blocks = paragraphs(documentation(value))
    # C functions repeat their signature in the first lines
    while blocks and re.match(r"[\w.]+\(.*\)( ->.*)?$", blocks[0].split("\n")[0]):
        first = "\n".join(blocks[0].split("\n")[1:]).strip()
        blocks = ([first] if first else []) + blocks[1:]
    doc = quoted(blocks)
    if len(doc) < 20 or " " not in doc:
        return None
    summary = re.split(r"(?<=[.!?])\s", " ".join(blocks[0].split()))[0]
    if len(summary) > 140:
        summary = summary[:140].rpartition(" ")[0] + " ..."
    return Member(kind, module, name, value, doc, summary, signature_of(value) if kind != "module" else "")


def members() -> Iterator[Member]:
    """Every documented name, modules in order, each object once."""
    seen: set[int] = set()

    def once(kind: str, module: str, name: str, value: Any) -> Iterator[Member]:
        found = member(kind, module, name, value)
        if found and id(value) not in seen:
            seen.add(id(value))
            yield found

    for owner in BUILTIN_TYPES:
        yield from once("class", "builtins", owner.__name__, owner)
        for name, value in sorted(vars(owner).items()):
            if not name.startswith("_") and callable(value):
                yield from once("method", "builtins", f"{owner.__name__}.{name}", value)
    for name, value in sorted(vars(importlib.import_module("builtins")).items()):
        if isinstance(value, type) and issubclass(value, BaseException):
            yield from once("exception", "builtins", name, value)
        elif inspect.isbuiltin(value) and not name.startswith("_"):
            yield from once("function", "builtins", name, value)
    for path in MODULES:
        module = importlib.import_module(path)
        yield from once("module", path, path, module)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in sorted(set(names)):
            value = getattr(module, name, None)
            home = getattr(value, "__module__", None) or ""
            if not (
                home.lstrip("_").split(".")[0] == path.split(".")[0] or name in getattr(module, "__all__", ())
            ):
                continue
            if inspect.isroutine(value):
                yield from once("function", path, f"{path}.{name}", value)
            elif inspect.isclass(value):
                kind = "exception" if issubclass(value, BaseException) else "class"
                yield from once(kind, path, f"{path}.{name}", value)
                for key, method in sorted(vars(value).items()):
                    if not key.startswith("_") and inspect.isroutine(method):
                        yield from once("method", path, f"{path}.{name}.{key}", method)


def parameters(m: Member) -> list[str]:
    """One line for each parameter of the signature."""
    lines = []
    for p in inspect.signature(m.value).parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.VAR_POSITIONAL:
            text = "any number of further positional arguments"
        elif p.kind is p.VAR_KEYWORD:
            text = "any number of further keyword arguments"
        else:
            text = "required" if p.default is p.empty else f"optional, default `{p.default!r}`"
            if p.kind is p.KEYWORD_ONLY:
                text += ", by keyword only"
            elif p.kind is p.POSITIONAL_ONLY:
                text += ", by position only"
        lines.append(f"- `{p.name}`: {text}.")
    return lines


def import_line(m: Member) -> str:
    """The statement that makes the name usable as it is written here; empty for builtins."""
    return "" if m.module == "builtins" else f"import {m.module}\n\n"


def listed(found: list[Member], limit: int = 6) -> str:
    """A list of names with their summaries."""
    return "\n".join(f"- `{m.name}`: {m.summary}" for m in found[:limit])


def count(n: int, word: str) -> str:
    """'1 argument', '3 arguments'."""
    return f"{n} {word}" if n == 1 else f"{n} {word}{'es' if word.endswith('s') else 's'}"


class Library:
    """The names of the standard library and what can be said about them."""

    def __init__(self) -> None:
        self.all = list(members())
        self.by_module: dict[str, list[Member]] = {}
        for m in self.all:
            self.by_module.setdefault(m.module, []).append(m)

    def where(self, m: Member) -> str:
        """The kind and home of a name, as it stands in a sentence."""
        if m.kind == "module":
            return "a module of the standard library"
        if m.kind == "method":
            return f"a method of the class `{m.name.rpartition('.')[0]}`"
        home = "built into Python" if m.module == "builtins" else f"in the module `{m.module}`"
        return (
            {"function": "a function", "class": "a class", "exception": "an exception"}[m.kind] + " " + home
        )

    def what(self, m: Member) -> str | None:
        return f"`{m.name}{m.signature}` is {self.where(m)}.\n\n{m.doc}"

    def signature(self, m: Member) -> str | None:
        if not m.signature or m.kind not in ("function", "method"):
            return None
        lines = parameters(m)
        text = f"The signature of `{m.name}` is:\n\n```python\n{m.name}{m.signature}\n```\n\n"
        if not lines:
            return text + "It takes no arguments."
        return text + f"It takes {count(len(lines), 'argument')}:\n\n" + "\n".join(lines)

    def call(self, m: Member) -> str | None:
        if not m.signature or m.kind not in ("function", "class", "exception"):
            return None
        names = [
            p.name
            for p in inspect.signature(m.value).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        target = "value" if m.kind == "class" else "result"
        verb = f"raise {m.name}" if m.kind == "exception" else f"{target} = {m.name}"
        optional = m.signature.count("=")
        needs = f"It needs {count(len(names), 'argument')}" if names else "It needs no arguments"
        more = f" and has {count(optional, 'optional one')}" if optional else ""
        return (
            f"Use it like this:\n\n```python\n{import_line(m)}{verb}({', '.join(names)})\n```\n\n"
            f"{needs}{more}. {m.summary}"
        )

    def example(self, m: Member) -> str | None:
        doc = documentation(m.value)
        found = re.search(r"^( *>>> .*\n(?:.*\S.*\n?)*)", doc, re.MULTILINE)
        if not found or m.kind == "module":
            return None
        code = inspect.cleandoc(found[1]).rstrip()
        if not 20 < len(code) < 420 or PRIVATE.search(code):
            return None
        return f"Here is an example of `{m.name}`:\n\n```python\n{code}\n```\n\n{m.summary}"

    def source(self, m: Member) -> str | None:
        if m.kind not in ("function", "method"):
            return None
        try:
            text = inspect.getsource(m.value)
        except (TypeError, OSError):
            return None
        text = inspect.cleandoc("\n" + text).expandtabs(4).rstrip()
        lines = text.split("\n")
        if not 3 <= len(lines) <= 24 or len(text) > 800 or PRIVATE.search(text):
            return None
        where = "as a method" if m.kind == "method" else "as a function"
        return f"Python defines `{m.name}` {where} of {count(len(lines), 'line')}:\n\n```python\n{text}\n```"

    def related(self, m: Member) -> str | None:
        prefix = m.name.rpartition(".")[0] if m.kind == "method" else ""
        others = [
            o
            for o in self.by_module[m.module]
            if o.kind == m.kind and o is not m and o.name.rpartition(".")[0].startswith(prefix)
        ]
        if m.kind == "module" or len(others) < 3:
            return None
        at = sum(o.name < m.name for o in others)
        near = (others[max(0, at - 2) : at] + others[at : at + 3])[:5]
        home = f"the class `{prefix}`" if prefix else f"the module `{m.module}`"
        return f"Near `{m.name}`, {home} has:\n\n{listed(near)}"

    def methods(self, m: Member) -> str | None:
        if m.kind != "class":
            return None
        found = [
            o for o in self.by_module[m.module] if o.kind == "method" and o.name.rpartition(".")[0] == m.name
        ]
        if len(found) < 2:
            return None
        some = "" if len(found) <= 6 else " Some of them are"
        return (
            f"The class `{m.name}` documents {count(len(found), 'method')}.{some}"
            f"{':' if some else ' They are:'}\n\n{listed(found)}"
        )

    def bases(self, m: Member) -> str | None:
        if m.kind not in ("class", "exception"):
            return None
        chain = [c.__name__ for c in m.value.__mro__]
        if len(chain) < 3:
            return None
        steps = "\n".join(f"{i}. `{name}`" for i, name in enumerate(chain, 1))
        return (
            f"`{m.name}` derives from `{chain[1]}`. Its method resolution order has {len(chain)} classes:"
            f"\n\n{steps}"
        )

    def contents(self, m: Member, kind: str, word: str) -> str | None:
        if m.kind != "module":
            return None
        found = [o for o in self.by_module[m.module] if o.kind == kind]
        if len(found) < 2:
            return None
        return (
            f"The module `{m.name}` documents {count(len(found), word)}. The first"
            f" {min(6, len(found))} by name are:\n\n{listed(found)}"
        )

    def functions(self, m: Member) -> str | None:
        return self.contents(m, "function", "function")

    def classes(self, m: Member) -> str | None:
        return self.contents(m, "class", "class")

    def importing(self, m: Member) -> str | None:
        if m.module == "builtins" or m.kind == "method":
            return None
        if m.kind == "module":
            return f"Import it by its name:\n\n```python\nimport {m.name}\n```\n\n{m.summary}"
        short = m.name.removeprefix(m.module + ".")
        return (
            f"Import the module, or the name itself:\n\n```python\nimport {m.module}\n"
            f"from {m.module} import {short}\n```\n\nAfter the first line it is `{m.name}`, after the second"
            f" `{short}`."
        )


# topic -> how one asks for it; {n} is the name, "it" refers to the turn before
QUESTIONS: dict[str, tuple[str, ...]] = {
    "what": (
        "What does {n} do?",
        "What is {n}?",
        "Can you explain {n}?",
        "Explain {n} to me, please.",
        "Tell me about {n}.",
        "I found {n} in some code. What is it for?",
    ),
    "signature": (
        "What is the signature of {n}?",
        "Which arguments does {n} take?",
        "What are the parameters of {n}?",
        "Which arguments of {n} are optional?",
    ),
    "call": ("How do I use {n}?", "How do I call {n}?", "Show me how to call {n}."),
    "example": ("Give me an example of {n}.", "Can you show an example of {n}?", "Show {n} in use."),
    "source": (
        "How is {n} implemented?",
        "Show me the source of {n}.",
        "What does the code of {n} look like?",
    ),
    "related": (
        "What else is there near {n}?",
        "Which names are related to {n}?",
        "What is similar to {n}?",
    ),
    "methods": ("Which methods does {n} have?", "List some methods of {n}.", "What can I do with {n}?"),
    "bases": ("What does {n} derive from?", "What is the base class of {n}?", "Show the bases of {n}."),
    "functions": ("Which functions are in {n}?", "List the functions of {n}."),
    "classes": ("Which classes are in {n}?", "List the classes of {n}."),
    "importing": ("How do I import {n}?", "What must I import to use {n}?"),
}
# what one may ask of each kind, most telling first
TOPICS = {
    "module": ("what", "functions", "classes", "importing"),
    "class": ("what", "methods", "bases", "call", "example", "related", "importing"),
    "exception": ("what", "bases", "related", "importing", "call"),
    "function": ("what", "signature", "source", "example", "call", "related", "importing"),
    "method": ("what", "signature", "source", "example", "related"),
}
ASKED = {
    "what": "what it is",
    "signature": "for its signature",
    "call": "how to call it",
    "example": "for an example",
    "source": "for its source",
    "related": "for its neighbours",
    "methods": "for its methods",
    "bases": "for its bases",
    "functions": "for its functions",
    "classes": "for its classes",
    "importing": "how to import it",
}
PLANS = {
    "what": "I should say what kind of name it is and quote its documentation.",
    "signature": "I should show the signature first and then go through the arguments one by one.",
    "call": "I should show a short piece of code and say which arguments are needed.",
    "example": "Its documentation has an example, so I can show that.",
    "source": "It is written in Python and short, so I can show all of it.",
    "related": "I should list the names beside it with a line for each.",
    "methods": "I should count the methods and list the first ones with a line for each.",
    "bases": "I should follow the method resolution order up to object.",
    "functions": "I should count the functions and list the first ones with a line for each.",
    "classes": "I should count the classes and list the first ones with a line for each.",
    "importing": "I should show the import statement.",
}


def thought(library: Library, m: Member, topic: str) -> str:
    """The reasoning before an answer."""
    return (
        f"<think>The question is about `{m.name}` and asks {ASKED[topic]}. `{m.name}` is {library.where(m)}."
        f" {PLANS[topic]}</think>"
    )


def conversation(library: Library, m: Member, variant: int) -> dict[str, Any] | None:
    """One conversation about a name, or None where there is too little to say."""
    answers = {
        topic: answer
        for topic in TOPICS[m.kind]
        if (answer := getattr(library, topic)(m)) and 80 <= len(answer) <= LONGEST_ANSWER
    }
    if "what" not in answers or (variant and len(answers) < 2):
        return None
    # a first conversation asks what the thing is, the others begin elsewhere; none begins with the import
    rank = {t: pick(range(1 << 30), m.name, variant, t) for t in answers}
    order = sorted(answers, key=lambda t: (variant == 0 and t != "what", t == "importing", rank[t]))
    turns = pick((1, 1, 2, 2, 3, 3, 4, 5), m.name, variant, "turns")
    chosen = order[:turns]
    messages: list[dict[str, str]] = []
    if pick(range(5), m.name, variant, "system") < 2:
        messages.append({"role": "system", "content": pick(SYSTEMS, m.name, variant)})
    think = pick(range(4), m.name, variant, "think") == 0
    for i, topic in enumerate(chosen):
        question = pick(QUESTIONS[topic], m.name, variant, topic)
        pronoun = i > 0 and pick(range(3), m.name, variant, topic, "it") < 2
        question = question.format(n="it" if pronoun else f"`{m.name}`" if i == 0 else m.name)
        answer = answers[topic].strip()
        if think:
            answer = thought(library, m, topic) + answer
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    while sum(len(x["content"]) for x in messages) > LONGEST_CONVERSATION:
        del messages[-2:]
    return {"id": f"{m.name}-{variant + 1}", "source": m.kind, "messages": messages}


def make() -> list[dict[str, Any]]:
    """All conversations, in the order of a hash of their ids."""
    library = Library()

    def rank(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    names = sorted((m for m in library.all if m.kind != "module"), key=lambda m: rank(m.name))[:NAMES]
    chosen = [m for m in library.all if m.kind == "module"] + names
    found = (conversation(library, m, variant) for m in chosen for variant in range(VARIANTS))
    return sorted((c for c in found if c), key=lambda c: rank(c["id"]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print what is in it."""
    parser = argparse.ArgumentParser(prog="python -m data.make_conversations", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("conversations.jsonl"))
    output = parser.parse_args(arguments).output
    made = make()
    text = "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in made)
    atomic_write(output, text)
    turns = sum(m["role"] == "user" for c in made for m in c["messages"])
    thinking = sum("<think>" in c["messages"][-1]["content"] for c in made)
    print(
        f"{output}: {len(made):,} conversations, {turns:,} turns, {thinking:,} with thinking,"
        f" {len(text.encode()):,} bytes, Python {sys.version.split()[0]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
