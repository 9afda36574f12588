"""A headless Chromium that opens a page as people do: light or dark, on a phone, with keys and touches.

It is driven by the DevTools protocol over two pipes, so that no socket and no further package is needed.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from PIL import Image

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
DESKTOP: Final = (1280, 900)
PHONE: Final = (390, 844)
_KEYS: Final = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Escape": 27, "Enter": 13}


# The page's background by whether it is dark.
PAPER: Final = {False: (250, 250, 248), True: (23, 24, 26)}
INK: Final = {False: "rgb(26, 26, 30)", True: "rgb(236, 236, 238)"}
# Keeps what the browser showed in this folder; read now, for tests run without variables of ours.
SCREENSHOTS: Final = os.environ.get("CRDIFF_TEST_SCREENSHOTS")


class Browser:
    """One open page."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers = commands, answers
        self._count = 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")

    def open(self, path: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
        """Open a page as a file, in a window of a size in pixels."""
        is_phone = size == PHONE
        self._call("Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1,
                   mobile=is_phone)  # fmt: skip
        self._call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._call("Page.navigate", url=path.resolve().as_uri())
        while self.run("document.readyState") != "complete":
            pass

    def run(self, script: str) -> Any:
        """Return what a JavaScript expression is worth."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        code = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self._call("Input.dispatchKeyEvent", type="keyUp", **code)

    def tap(self, x: float, y: float) -> None:
        """Touch a point of the window and let it go."""
        self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self, *, whole: bool = True) -> bytes:
        """Return a PNG file of the whole page, or of the window."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> bytes:
        parts = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            parts += byte
        return bytes(parts)


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """Start a browser that keeps its files in a folder, until the block ends."""
    assert CHROMIUM
    their_commands, our_commands = os.pipe()
    our_answers, their_answers = os.pipe()
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--remote-debugging-pipe", f"--user-data-dir={profile}")  # fmt: skip
    # The protocol wants the descriptors 3 and 4, which only a shell gives to a program it becomes.
    line = f'exec "$@" 3<&{their_commands} 4>&{their_answers}'
    process = subprocess.Popen(
        ["bash", "-c", line, "bash", CHROMIUM, *flags, "about:blank"], pass_fds=(their_commands, their_answers),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(their_commands)
    os.close(their_answers)
    with os.fdopen(our_commands, "wb") as commands, os.fdopen(our_answers, "rb") as answers:
        try:
            yield Browser(commands, answers)
        finally:
            process.kill()
            process.wait()


def shown(browser: Browser, name: str, *, whole: bool = True) -> Image.Image:
    """Return what the browser shows, which is kept as a file on request."""
    png = browser.screenshot(whole=whole)
    if SCREENSHOTS:
        Path(SCREENSHOTS, f"{name}.png").write_bytes(png)
    return Image.open(io.BytesIO(png)).convert("RGB")


def check_looks(browser: Browser, page: Path, name: str) -> None:
    """Check that a page fits the window and has the colours of light and dark, its plots too, on desktop and phone."""
    for size in (DESKTOP, PHONE):
        for dark in (False, True):
            browser.open(page, size, dark=dark)
            image = shown(browser, f"{name}-{size[0]}-{'dark' if dark else 'light'}")
            assert image.getpixel((1, 1)) == PAPER[dark]
            assert browser.run("document.documentElement.scrollWidth") <= size[0]  # nothing to scroll sideways
            for text in browser.run("[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)")[
                :1
            ]:
                assert text == INK[dark]
            corners = browser.run(
                "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect()).map(({x, y}) => [x, y])"
            )
            for x, y in corners:
                assert image.getpixel((int(x) + 2, int(y) + 2)) == PAPER[dark]
