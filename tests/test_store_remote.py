"""Object stores: a real S3 server on loopback behind a gate that loses, cuts and counts answers."""

import http.client
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from moto.server import ThreadedMotoServer

import featurestore
from configs.errors import ContractError, PartExistsError, StoreCorruptError, StoreError, StoreNotFoundError
from featurestore import Loader, StoreWriter, open_store, part_exists, publish, remote
from featurestore.objects import open_objects
from tests.documents import CONTRACT, append, assert_same, make, write

MADE = [make(uid, length, 2, 64) for uid, length in enumerate([1, 130, 64, 7, 200])]
MORE = [make(uid, length, 2, 64) for uid, length in enumerate([90, 3, 80], start=10)]


@dataclass
class Gate:
    """What passes between client and server."""

    backend: int
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    in_flight: int = 0
    most_in_flight: int = 0
    fail: int = 0  # answer so many requests with 503
    cut: int = 0  # end so many object answers in the middle
    lose: str = ""  # answer 503 to the next request for this path, after it was carried out
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ranges(self, suffix: str) -> list[str]:
        return [r for method, path, r in self.requests if method == "GET" and r and path.endswith(suffix)]


def handler(gate: Gate) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with gate.lock:
                gate.requests.append((self.command, self.path.split("?")[0], self.headers.get("Range")))
                gate.in_flight += 1
                gate.most_in_flight = max(gate.most_in_flight, gate.in_flight)
                failing, gate.fail = gate.fail > 0, max(0, gate.fail - 1)
                cutting = gate.cut > 0 and self.headers.get("Range") is not None and not failing
                gate.cut -= cutting
            try:
                if failing:
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection("127.0.0.1", gate.backend)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                data = answer.read()
                if gate.lose and self.command == "PUT" and self.path.split("?")[0].endswith(gate.lose):
                    gate.lose = ""
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    connection.close()
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cutting else data)
                if cutting:
                    self.close_connection = True
                connection.close()
            finally:
                with gate.lock:
                    gate.in_flight -= 1

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    backend = moto.get_host_and_port()[1]
    gate = Gate(backend)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(gate))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{backend}").create_bucket(Bucket="features")
        yield gate
    server.shutdown()
    moto.stop()


@pytest.fixture(params=["s3", "memory", "file"])
def url(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("gate")
    name = request.node.name.replace("[", "-").rstrip("]")
    return {"s3": f"s3://features/{name}", "memory": f"memory://{name}", "file": f"file://{tmp_path}/s"}[
        request.param
    ]


def test_every_kind_of_url_writes_reads_and_verifies(url) -> None:
    with pytest.raises(StoreNotFoundError):
        open_store(url)
    write(url, MADE, part="a")
    publish(url)
    write(url, MORE, part="b", compression="zstd")
    assert part_exists(url, "b")
    assert not part_exists(url, "c")
    publish(url)
    store = open_store(url)
    for document, made in zip(store, MADE + MORE, strict=True):
        assert_same(document, made)
    assert_same(store.read(4, 60, 70), MADE[4], 60, 70)
    assert store.verify() == []
    with Loader(store, 256, split="all", epochs=1) as loader:
        assert sorted(uid for batch in loader for uid in batch.uids) == [d.uid for d in MADE + MORE]
    featurestore.drop(url, ["a"])
    assert len(open_store(url)) == len(MORE)
    with pytest.raises(ContractError):
        StoreWriter(url, {**CONTRACT, "dtype": "float8"})
    assert featurestore.info(url)["totals"]["documents"] == len(MORE)


def test_a_commit_whose_answer_is_lost_is_no_other_writers(gate) -> None:
    url = "s3://features/lost-answer"
    gate.lose = "commits/a"
    write(url, MADE, part="a")
    assert not gate.lose, "no answer was lost"
    publish(url)
    for document, made in zip(open_store(url), MADE, strict=True):
        assert_same(document, made)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"parts/b.00000000"])
def test_commit_markers_are_checked_and_made_again(request, content) -> None:
    url = f"memory://markers-{request.node.callspec.indices['content']}"
    write(url, MADE, part="a")
    write(url, MORE, part="b")
    publish(url)
    bucket = open_objects(url)
    if content is None:
        bucket.delete("commits/a")
    else:
        bucket.write("commits/a", content)
    (problem,) = featurestore.verify(url).problems
    assert problem.object == "commits/a"
    assert featurestore.verify(url, repair=True).quarantined == []
    assert featurestore.verify(url).problems == []
    assert part_exists(url, "a")
    featurestore.rebuild(url)
    for document, made in zip(open_store(url), MADE + MORE, strict=True):
        assert_same(document, made)


def test_a_marker_of_an_unpublished_part_that_names_nothing_is_reported() -> None:
    url = "memory://unpublished-marker"
    write(url, MADE, part="a")
    publish(url)
    write(url, MORE, part="b")
    open_objects(url).write("commits/b", b"x")
    with pytest.raises(StoreCorruptError, match="commits/b"):
        publish(url)
    assert [p.object for p in featurestore.verify(url, repair=True).problems] == ["commits/b"]
    write(url, MORE, part="b")
    publish(url)
    assert len(open_store(url)) == len(MADE + MORE)


def test_commit_is_create_only(url) -> None:
    first, second = (StoreWriter(url, CONTRACT, part="block") for _ in range(2))
    append(second, MADE[4])
    append(first, MADE[1])
    assert first.commit() == "block"
    with pytest.raises(PartExistsError):
        second.commit()
    with pytest.raises(PartExistsError):
        StoreWriter(url, CONTRACT, part="block")
    publish(url)
    (document,) = open_store(url)
    assert_same(document, MADE[1])
    assert featurestore.verify(url).problems == []


def test_leftovers_are_ignored_and_collected(url) -> None:
    abandoned = StoreWriter(url, CONTRACT, part="block")
    append(abandoned, MADE[4])
    abandoned._write_metadata(abandoned._staging)  # killed at the last moment before the commit
    write(url, MADE, part="block")
    publish(url)
    assert len(open_store(url)) == len(MADE)
    removed = featurestore.collect(url, older_than_s=-60)
    assert removed == [abandoned._staging]
    assert featurestore.verify(url).problems == []


def test_damage_is_found_and_repaired(url) -> None:
    write(url, MADE, part="a")
    write(url, MORE, part="b")
    publish(url)
    store = open_store(url)
    place = store.manifest["parts"][0]["path"]
    for name in (f"{place}/hidden/c/0/0/0", f"{place}/input_ids/c/0"):
        data = store.objects.read(name)
        changed = bytearray(data)
        changed[3] ^= 1
        for damage, message in (
            (bytes(changed), "chunk 0 fails its checksum"),
            (data[:-100], "bytes, .* expected|not as long as"),
            (data + b"x", "bytes, .* expected|not as long as"),
            (None, "is missing"),
        ):
            if damage is None:
                store.objects.delete(name)
            else:
                store.objects.write(name, damage)
            found = open_store(url)
            with pytest.raises(StoreCorruptError, match=message):
                found[0]
            assert [p.part for p in found.verify()] == ["a"]
        store.objects.write(name, data)
    assert open_store(url).verify() == []
    store.objects.delete(f"{place}/loss_mask/c/0")
    report = featurestore.verify(url, repair=True)
    assert report.quarantined == ["a"]
    assert open_store(url).uid.tolist() == [d.uid for d in MORE]
    write(url, MADE, part="a")
    publish(url)
    assert len(open_store(url)) == len(MADE + MORE)
    assert featurestore.verify(url).problems == []


def test_merge_copies_on_the_server(url) -> None:
    a, b = f"{url}-a", f"{url}-b"
    if url.startswith("memory"):
        a, b = f"{url}/a", f"{url}/b"
    write(a, MADE, part="a")
    write(b, MORE, part="b")
    publish(a)
    publish(b)
    featurestore.merge(a, [b])
    assert len(open_store(a)) == len(MADE + MORE)
    assert featurestore.verify(a).problems == []


def test_one_range_request_a_state_and_array(gate) -> None:
    url = "s3://features/ranges"
    write(url, MADE)
    publish(url)
    store = open_store(url)
    gate.requests.clear()
    store[4]
    for array in ("hidden/c/0/0/0", "hidden/c/0/1/0", "input_ids/c/0", "loss_mask/c/0"):
        assert len(gate.ranges(array)) == 1
    gate.requests.clear()
    store.read(1, 100, 110, states=[1])
    assert [method for method, _, _ in gate.requests] == ["GET"] * 3  # the part is open: no look at sizes


def test_long_ranges_are_fetched_in_parallel(gate, monkeypatch) -> None:
    url = "s3://features/parallel"
    long = make(1, 3000, 1, 512)
    write(url, [make(0, 5, 1, 512), long])
    publish(url)
    monkeypatch.setattr(remote, "PIECE", 256 << 10)
    store = open_store(url)
    gate.requests.clear()
    gate.most_in_flight = 0
    assert_same(store[1], long)
    assert len(gate.ranges("hidden/c/0/0/0")) == -(-long.hidden.nbytes // (256 << 10))
    assert gate.most_in_flight > 2


def test_failed_and_cut_answers_are_asked_for_again(gate) -> None:
    url = "s3://features/retries"
    gate.fail = 2
    write(url, MADE)
    gate.fail = 1
    publish(url)
    store = open_store(url)
    for i, made in enumerate(MADE):
        gate.fail, gate.cut = 1, 2
        assert_same(store[i], made)
        assert (gate.fail, gate.cut) == (0, 0)


def test_a_server_that_stays_away_is_named(gate, monkeypatch) -> None:
    url = "s3://features/away"
    write(url, MADE)
    publish(url)
    monkeypatch.setattr(remote, "TRIES", 2)
    store = open_store(url)
    gate.fail = 10_000
    try:
        with pytest.raises(StoreError, match=r"cannot read s3://features/away/parts/"):
            store[0]
    finally:
        gate.fail = 0


def test_a_bucket_that_is_not_there_is_named(gate) -> None:
    with pytest.raises(StoreError, match="s3://nowhere/x"):
        open_store("s3://nowhere/x")


def test_an_uploaded_store_is_readable_and_grows(gate, tmp_path) -> None:
    write(tmp_path, MADE, part="a")
    publish(tmp_path)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{gate.backend}")
    for file in tmp_path.rglob("*"):
        if file.is_file():
            client.put_object(
                Bucket="features", Key=f"uploaded/{file.relative_to(tmp_path)}", Body=file.read_bytes()
            )
    url = "s3://features/uploaded"
    write(url, MORE, part="b")
    publish(url)
    assert len(open_store(url)) == len(MADE + MORE)
    assert featurestore.verify(url).problems == []
