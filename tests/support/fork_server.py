"""A server that runs command lines in forks of a process that has loaded everything, which spares their start-up.

`python fork_server.py KIND MODULE...` loads what an export needs and these modules. It reads jobs from stdin, one JSON
object a line, and answers each with its process id, and then with its exit code. A job may add environment variables,
and a hook: the nth call of a function sends a signal to its own process, or waits for a file. With the KIND
"hub-client" a job has an environment of its own. The Hub's client reads that when it is loaded, so a fork loads it for
all jobs of one environment.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import runpy
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GUARD = Path(__file__).with_name("guard")


def serve() -> None:
    """Run jobs until stdin ends."""
    kind, *modules = sys.argv[1:]
    if kind == "hub-client":
        runpy.run_path(str(GUARD / "short_sleep.py"))  # before anything keeps `time.sleep` as a default
    for module in modules:
        importlib.import_module(module)
    warm()
    if kind == "hub-client":
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # what the client is made of stays loaded
        logging.getLogger("huggingface_hub").handlers.clear()
    say("ready")
    line = sys.stdin.readline()
    while line:
        if kind == "hub-client":
            line = serve_with_client(line)
        else:
            start(json.loads(line))
            line = sys.stdin.readline()


def serve_with_client(line: str) -> str:
    """Run a job, and those that follow, in a fork that has loaded the Hub's client; return the first it is not for."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        job = json.loads(line)
        loaded = read_by_client(job["env"])
        take_on(job["env"])
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        # A new process would load this by itself.
        runpy.run_path(str(GUARD / "sitecustomize.py"), run_name="sitecustomize")
        importlib.import_module("huggingface_hub.hf_api")
        ssl.create_default_context(capath=os.devnull)  # the first one takes long
        while line and read_by_client(job["env"]) == loaded:
            take_on(job["env"])
            start(job)
            if line := sys.stdin.readline():
                job = json.loads(line)
        os.write(writer, line.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as rest:
        line = rest.read()
    os.wait()
    return line


def take_on(environment: Mapping[str, str]) -> None:
    """Have this environment and nothing else."""
    os.environ.clear()
    os.environ.update(environment)


def read_by_client(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what decides which of the Hub's clients is loaded, and what that reads then; not the token."""
    names = (name for name in environment if name == "PYTHONPATH" or name.startswith("HF_"))
    return {name: environment[name] for name in names if name != "HF_TOKEN"}


def start(job: dict[str, Any]) -> None:
    """Run a job in a fork, and answer it."""
    child = os.fork()
    if child == 0:
        run(job)
    say(child)
    _, status = os.waitpid(child, 0)
    say(os.waitstatus_to_exitcode(status))


def warm() -> None:
    """Load all that an export loads, and leave signals as they were."""
    from crdiff_export.cli import main

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # stdout is the way to the client
        contextlib.suppress(SystemExit),
    ):
        main(["export", "demo", "--res", "64", "-qo", f"{folder}/warm.safetensors"])
    for signum, handler in before.items():
        signal.signal(signum, handler)


def say(word: object) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def run(job: dict[str, Any]) -> None:
    """Run a job in the child; never returns."""
    from crdiff_export.cli import main

    code: Any = 99
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # not Python's exception
    try:
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=os.isatty(1))  # as in a process that begins there
        if job["limit"] is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        sys.platform = job["platform"] or sys.platform
        if job["hook"]:
            hook(**job["hook"])
        main(job["args"])
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  a fork must not go on in its parent's loop
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def hook(call: str, nth: int, do: int | str, *, after: bool) -> None:
    """Let the nth call of a function send signal `do` to this process, or wait for the file `do`."""
    module_name, _, name = call.rpartition(".")
    module = importlib.import_module(module_name)
    original: Callable[..., Any] = getattr(module, name)
    calls = 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            act(do)
        result = original(*args, **kwargs)
        if calls == nth and after:
            act(do)
        return result

    setattr(module, name, hooked)


def act(do: int | str) -> None:
    if isinstance(do, int):
        os.kill(os.getpid(), do)
        return
    signal.alarm(60)
    Path(f"{do}.reached").touch()
    while not Path(do).exists():
        time.sleep(0.005)
    signal.alarm(0)


if __name__ == "__main__":
    serve()
