"""Any order of append, commit, crash, publish, drop, rebuild, collect and read keeps what was published."""

import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import featurestore
from featurestore import StoreWriter, open_store, part_exists, publish
from featurestore.objects import open_objects
from tests.documents import CONTRACT, Made, append, assert_same, make, write

WRITERS = 3


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="store-states-"))
        write(self.path, [], part="first")
        # no fsync: what it is for shows only when the machine stops, and it takes most of the time
        self.objects = open_objects(self.path, durable=False)
        publish(self.objects)
        self.next_uid = 0
        self.writers: dict[int, StoreWriter] = {}
        self.open: dict[int, list[Made]] = {}
        self.committed: dict[str, list[Made]] = {}
        self.published: set[str] = set()
        self.dropped: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.path)

    @rule(number=st.integers(0, WRITERS - 1), length=st.integers(1, 150), twin=st.booleans())
    def append(self, number: int, length: int, twin: bool) -> None:
        if number not in self.writers:
            codec = "zstd" if number == 1 else "none"
            self.writers[number] = StoreWriter(
                self.path, CONTRACT, writer=f"w{number}", run="run", compression=codec, durable=False
            )
            self.open[number] = []
        uid = self.next_uid
        if twin and self.committed:  # the same document again in another part, as after a repeated block
            known = [d for documents in self.committed.values() for d in documents]
            old = known[length % len(known)]
            if old.uid not in {d.uid for d in self.open[number]}:
                uid, length = old.uid, len(old.input_ids)
        document = make(uid, length)
        self.next_uid += uid == self.next_uid
        append(self.writers[number], document)
        self.open[number].append(document)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.writers)))
        name = self.writers.pop(number).commit()
        assert name is not None
        assert part_exists(self.path, name)
        assert name not in self.committed
        self.committed[name] = self.open.pop(number)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.writers)))
        del self.writers[number], self.open[number]

    @rule()
    def publish(self) -> None:
        before = open_store(self.path).version
        news = self.committed.keys() - self.published - self.dropped
        manifest = publish(self.objects)
        assert (manifest["version"] > before) == bool(news)
        self.published |= news

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        featurestore.drop(self.objects, [name])
        self.dropped.add(name)
        self.published = self.committed.keys() - self.dropped

    @rule()
    def rebuild(self) -> None:
        featurestore.rebuild(self.objects)
        self.published = self.committed.keys() - self.dropped

    @rule()
    def collect(self) -> None:
        # a live writer's open part is as young as its last write; here, old enough to be one of the dead
        if not self.writers:
            featurestore.collect(self.objects, older_than_s=0)
            names = {p.name for p in (self.path / "parts").iterdir()}
            assert names == self.committed.keys() | {"first"}

    @invariant()
    def published_documents_are_there_once(self) -> None:
        store = open_store(self.path)
        expected = {d.uid: d for name in self.published for d in self.committed[name]}
        assert sorted(store.uid.tolist()) == sorted(expected)
        for document in store:
            assert_same(document, expected[document.uid])

    @rule()
    def verify(self) -> None:
        assert featurestore.verify(self.path).problems == []


TestStoreStates = StoreMachine.TestCase
TestStoreStates.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
