"""A headless Chromium, spoken to over its DevTools pipe: no driver, no port, no network."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium reads commands from descriptor 3 and answers on 4.
_START = "import os, sys; r, w = map(int, sys.argv[1:3]); r, w = os.dup(r), os.dup(w); os.dup2(r, 3); os.dup2(w, 4); " \
         "os.set_inheritable(3, True); os.set_inheritable(4, True); os.execv(sys.argv[3], sys.argv[3:])"  # fmt: skip


def program() -> str | None:
    """The browser's path; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class PageError(AssertionError):
    """What the page's own script raised, or what an expression did."""


class Chromium:
    """One browser with one page.

    Fields:
      problems: exceptions, errors on the console and blocked content of all pages seen so far.
      requests: addresses that pages asked for, other than themselves.
    """

    def __init__(self, folder: Path, seconds: float = 20.0) -> None:
        self.seconds, self.problems, self.requests = seconds, list[str](), list[str]()
        self._number, self._left, self._answers = 0, b"", dict[int, dict[str, Any]]()
        self._events: list[dict[str, Any]] = []
        given, self._to = os.pipe()
        self._from, told = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}", "--hide-scrollbars", "about:blank"]  # fmt: skip
        command = [sys.executable, "-c", _START, str(given), str(told), str(program()), *options]
        self._process = subprocess.Popen(command, pass_fds=(given, told), stderr=subprocess.DEVNULL)
        os.close(given)
        os.close(told)
        target = self.send("Target.createTarget", url="about:blank", session="")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True, session="")["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        self.send("Performance.enable", timeDomain="threadTicks")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close", session="")
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._to)
            os.close(self._from)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session := self._session if session is None else session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        limit, number = time.monotonic() + self.seconds, self._number
        while number not in self._answers:
            self._read(limit)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        return dict(answer["result"])

    def _read(self, limit: float) -> None:
        ready, _, _ = select.select([self._from], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            raise TimeoutError("the browser does not answer")
        *whole, self._left = (self._left + os.read(self._from, 1 << 20)).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(one.get("value", one)) for one in params["args"]))
        elif event == "Network.requestWillBeSent" and params["request"]["url"] != params["documentURL"]:
            self.requests.append(params["request"]["url"])

    def size(self, width: int, height: int, *, touch: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def open(self, path: Path, anchor: str = "") -> float:
        """Load a page and wait until its script has started everything. Seconds it took."""
        start = time.perf_counter()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.resolve().as_uri() + anchor)
        self.wait("document.documentElement?.dataset.ready === 'true'")
        self.frames()
        return time.perf_counter() - start

    def run(self, code: str) -> Any:
        """The value of an expression (of a promise: what it gives)."""
        result = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in result:
            raise PageError(result["exceptionDetails"].get("exception", {}).get("description", "?"))
        return result["result"].get("value")

    def wait(self, code: str) -> None:
        """Until `code` is true; what the page complained of is in the error when it never is."""
        limit = time.monotonic() + self.seconds
        while not self.run(code):
            if time.monotonic() > limit:
                raise TimeoutError(f"{code}: {self.problems}")
            time.sleep(0.01)

    def frames(self, number: int = 2) -> None:
        """Let so many frames be painted."""
        for _ in range(number):
            self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def busy(self, code: str = "") -> dict[str, float]:
        """Processor seconds of the page's thread, by kind ("Task" is all), for an expression and what it has painted.

        Seconds of the processor, not of the clock: other work on the machine does not count.
        """
        before = self._thread()
        if code:
            self.run(code)
        self.frames(2)
        after = self._thread()
        return {name: round(after[name] - before[name], 4) for name in after}

    def busy_so_far(self) -> float:
        """Processor seconds of the page's thread since the page began."""
        return self._thread()["Task"]

    def _thread(self) -> dict[str, float]:
        kinds = {
            "TaskDuration": "Task",
            "ScriptDuration": "Script",
            "LayoutDuration": "Layout",
            "RecalcStyleDuration": "Style",
        }
        found = self.send("Performance.getMetrics")["metrics"]
        return {kinds[one["name"]]: one["value"] for one in found if one["name"] in kinds}

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{find}.scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({find}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.frames()

    def drag(self, x: float, y: float, to: float) -> None:
        """Press at (x, y), move to (`to`, y), and let go."""
        for kind, where in (
            ("mousePressed", x),
            ("mouseMoved", (x + to) / 2),
            ("mouseMoved", to),
            ("mouseReleased", to),
        ):
            self.send("Input.dispatchMouseEvent", type=kind, x=where, y=y, button="left", buttons=1, clickCount=1)
        self.frames()

    def key(self, name: str, text: str = "") -> None:
        """Press and release one key ("ArrowDown", "Enter", "a")."""
        code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
                "Home": 36, "End": 35, "PageDown": 34, "Tab": 9}.get(name, ord(name[0].upper()))  # fmt: skip
        text = text or ("\r" if name == "Enter" else name if len(name) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=code, text=text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=code)
        self.frames()

    def picture(self, path: Path) -> None:
        data = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
