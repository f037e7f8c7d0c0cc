"""A server of forked processes that has imported lorafit, since imports take most of a short process."""

import json
import os
import socket
import sys
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

IMPORTED = get_context("forkserver")
# installed modules alone: the server does not search pytest's `pythonpath`, and says nothing of a failed import
IMPORTED.set_forkserver_preload(
    ["lorafit.api.train", "lorafit.api.merge", "lorafit.api.processes.launch", "lorafit.cli.app"]
)


def run_each(target, arguments, limit_s=240):
    """Run `target` in one process for each of `arguments`, and hold that all end well."""
    workers = [IMPORTED.Process(target=target, args=given) for given in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(limit_s)
        assert worker.exitcode == 0


def exit_code_of(code: str) -> int | None:
    """Run Python source in a process of its own; a killed one has its signal's negative number."""
    process = IMPORTED.Process(target=exec, args=(code, {}))
    process.start()
    process.join(240)
    return process.exitcode


PROGRAM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"-"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    sys.exit(int(server.recv(16)))
"""


@contextmanager
def typed_program():
    """Yield a folder with a program `lorafit`: typed in a shell, it is the command in a forked process.

    Words, working directory, environment, streams and exit code are those of a process of its own.
    """
    with TemporaryDirectory(prefix="lorafit-") as folder, socket.socket(socket.AF_UNIX) as server:
        address, program = f"{folder}/socket", Path(folder, "lorafit")
        program.write_text(PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o755)
        server.bind(address)
        server.listen()
        Thread(target=_start_each, args=(server,), daemon=True).start()
        yield folder
        server.shutdown(socket.SHUT_RDWR)


def _start_each(server):
    while True:
        try:
            caller, _ = server.accept()
        except OSError:  # shut down
            return
        with caller:
            process = IMPORTED.Process(target=_be_the_command, args=(caller,))
            process.start()
            process.join()
            caller.sendall(str(process.exitcode).encode())


def _be_the_command(caller):
    from lorafit.cli import app

    _, streams, *_ = socket.recv_fds(caller, 1, 3)
    words, folder, environment = json.loads(caller.makefile().readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["lorafit", *words]
    app.main()
