"""A headless Chromium for tests and benchmarks of the page.

It is driven by the DevTools protocol over two pipes, which needs no package. Messages are JSON, each
followed by a zero byte. Chromium reads them from its file descriptor 3 and writes to 4.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 120  # seconds for an answer


def find_chromium() -> str | None:
    """The path of a Chromium, or None if there is none."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One page, with the messages that it printed and the addresses that it asked for."""

    def __init__(self, width: int = 1200, height: int = 900):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        from_us, self.to_browser = os.pipe()
        self.from_browser, to_us = os.pipe()
        command = [
            find_chromium(),
            "--headless",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--hide-scrollbars",
            f"--user-data-dir={self.profile.name}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        # in the child the pipes become file descriptors 3 and 4, whatever their numbers are here
        shell = ["bash", "-c", f'exec 3<&{from_us} 4>&{to_us}; exec "$@"', "browser", *command]
        self.process = subprocess.Popen(
            shell,
            pass_fds=(from_us, to_us),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self.session = None
        self.count = 0
        self.received = b""
        self.messages = []  # what the page printed, and errors
        self.requests = []  # addresses
        self.loaded = False
        self.is_held = False  # the mouse's button
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        answer = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)
        self.profile.cleanup()

    def send(self, method: str, **params) -> dict:
        """A command to the browser, and its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self) -> dict:
        """The next message of the browser; events are noted."""
        while b"\0" not in self.received:
            if not select.select([self.from_browser], [], [], TIMEOUT)[0]:
                raise TimeoutError(f"the browser has not answered for {TIMEOUT} seconds")
            piece = os.read(self.from_browser, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.received += piece
        text, _, self.received = self.received.partition(b"\0")
        message = json.loads(text)
        method = message.get("method")
        params = message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.messages.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str([item.get("value") for item in params["args"]]))
        elif method == "Log.entryAdded":
            self.messages.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return message

    def open(self, address: str):
        """Open a page of this project, and wait until it is ready."""
        self.loaded = False
        self.send("Page.navigate", url=address)
        while not self.loaded:
            self.receive()
        self.wait_for("document.body.dataset.ready === 'true'")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, or of the promise that it is."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(expression):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} did not become true; {self.messages}")
            time.sleep(0.02)

    def mouse(self, kind: str, x: float, y: float):
        """`kind` is mousePressed, mouseMoved or mouseReleased; x and y are pixels of the window."""
        button = {}
        if kind != "mouseMoved":
            button = {"button": "left", "clickCount": 1}
            self.is_held = kind == "mousePressed"
        held = int(self.is_held)
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, buttons=held, **button)

    def key(self, key: str):
        """Press a key and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screenshot(self, path: str):
        """Write a picture of the window as PNG."""
        answer = self.send("Page.captureScreenshot")
        with open(path, "wb") as file:
            file.write(base64.b64decode(answer["data"]))
