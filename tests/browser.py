"""A headless Chromium, spoken to over its DevTools protocol; nothing but the browser itself is needed."""

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"]
    + ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    + ["--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-port=0"]
)
START_SECONDS = 60.0


def installed() -> str | None:
    """Path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.numbers, self.events = socket, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are kept."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            said = json.loads(self.socket.recv(timeout=START_SECONDS))
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self.events.append(said)

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        """Load a file, `width` CSS pixels wide, as in a light or a dark room."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + START_SECONDS
        while self.value("document.readyState") != "complete" or self.value("location.protocol") != "file:":
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """What JavaScript says."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console and exceptions since the page was opened."""
        return [
            json.dumps(event["params"])
            for event in self.events
            if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ]

    def fetched(self) -> list[str]:
        """Addresses that the page asked for."""
        sent = (
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        )
        return [url for url in sent if not url.startswith("data:")]


@contextlib.contextmanager
def running(program: str) -> Iterator[Page]:
    """A browser with an empty profile and one page; both end with the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with open(Path(profile) / "said", "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            port = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + START_SECONDS
            while not (port.exists() and len(port.read_text().splitlines()) == 2):
                assert process.poll() is None, (Path(profile) / "said").read_text()
                assert time.monotonic() < deadline, (Path(profile) / "said").read_text()
                time.sleep(0.05)
            number, path = port.read_text().splitlines()
            with connect(f"ws://127.0.0.1:{number}{path}", max_size=None) as whole:
                whole.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
                targets = json.loads(whole.recv(timeout=START_SECONDS))["result"]["targetInfos"]
            one = next(t["targetId"] for t in targets if t["type"] == "page")
            with connect(f"ws://127.0.0.1:{number}/devtools/page/{one}", max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()
