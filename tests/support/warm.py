"""Programs in processes of their own, forked from one that has imported the hosts before: importing takes ten seconds.

A test about imports, or about a program that knows nothing of Bitune, starts a real process in place of this.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing.connection import Client, Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HOSTS = ("datasets", "matplotlib.pyplot", "bitune_plugin.integrations.lm_eval.model")
HOSTS += ("bitune_plugin.integrations.trl.trainer",)  # and all that these import

start_process = subprocess.run


@cache
def _server() -> str:
    """Starts it once; its address. It ends with this process, because its standard input does, however that ends."""
    folder = TemporaryDirectory()
    address = str(Path(folder.name, "socket"))
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)
    server.stdout.readline()
    return address


def run(
    command: Sequence[object],
    cwd: Path | str = ".",
    env: Mapping[str, str] = os.environ,
    address: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ...` or `python -m MODULE ...`; what `subprocess.run` gives where it captures text."""
    with TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        with Client(address or _server(), "AF_UNIX") as server:
            server.send(([str(word) for word in command[1:]], os.path.abspath(cwd), dict(env), files))
            code = server.recv()
        return subprocess.CompletedProcess(command, code, *(Path(file).read_text() for file in files))


def _serve(address: str) -> None:
    """A handler for each request, forked; and the program, forked from that, so that the handler can wait for it."""
    for host in HOSTS:
        import_module(host)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
        request = Connection(listening.accept()[0].detach())
        if os.fork() == 0:
            listening.close()  # or a program would wait for a server that is no more
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = request.recv()
            if (child := os.fork()) == 0:
                return _be(*program, address)
            request.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        request.close()


def _be(arguments: list[str], cwd: str, environment: dict[str, str], files: list[str], address: str) -> None:
    """Becomes the program. What it starts with the same Python is forked, too."""
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)

    def run_by_a_program(command: Sequence[str], check: bool = False, **options: Any) -> Any:
        if command[0] != sys.executable:
            return start_process(command, check=check, **options)
        chosen = {name: options[name] for name in ("cwd", "env") if name in options}
        done = run(command, address=address, **chosen)
        if "stdout" not in options:
            print(done.stdout, end="", flush=True)
        print(done.stderr, end="", file=sys.stderr, flush=True)
        if check:
            done.check_returncode()
        return done

    subprocess.run = run_by_a_program
    if arguments[0] == "-m":
        sys.path[0], sys.argv = cwd, arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[:1] = [] if Path(arguments[0]).is_dir() else [str(Path(arguments[0]).parent)]
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _serve(sys.argv[1])
