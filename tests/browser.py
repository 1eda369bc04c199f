"""A headless Chromium, driven by its DevTools protocol over a pair of pipes: no package is needed.

Messages are JSON objects that end with a zero byte (chromium --remote-debugging-pipe): commands with an id go
in through file 3, answers and events come out of file 4.
"""

import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
LIMIT_S = 120  # of one answer: only a hang takes so long


def find_browser():
    """The path of a Chromium. Skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found or not shutil.which("bash"):
        pytest.skip(f"none of {', '.join(NAMES)} is installed; on Debian: apt-get install chromium")
    return found


class Browser:
    """One page. events: [(method, parameters)…] since `visit`."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()  # (read, write) from and to the browser
        self.read, self.write = ours[0], theirs[1]
        arguments = [
            find_browser(), "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{ours[1]}', "bash", *arguments],
            pass_fds=(theirs[0], ours[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs[0])
        os.close(ours[1])
        self.waiting, self.number, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def receive(self, deadline):
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.read, 1 << 20) if ready else b""
            assert data, f"the browser gave no answer within {LIMIT_S} s, or has ended"
            self.waiting += data
        text, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(text)

    def call(self, method, **parameters):
        """The result of a command; events that arrive before it are kept."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + LIMIT_S
        while (answer := self.receive(deadline)).get("id") != self.number:
            self.events.append((answer["method"], answer["params"]))
        assert "result" in answer, answer
        return answer["result"]

    def run(self, expression):
        """The value of a JavaScript expression, a promise awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        deadline = time.monotonic() + LIMIT_S
        while not self.run(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def visit(self, file, width=1280, height=900, scheme="light"):
        """Open a report from disk and wait until its lists are filled."""
        self.events = []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=f"file://{file}")
        self.until("location.protocol === 'file:' && document.documentElement?.dataset.ready === 'yes'")

    def of(self, *methods):
        return [parameters for method, parameters in self.events if method in methods]
