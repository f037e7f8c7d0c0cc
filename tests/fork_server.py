"""A server of forked processes that has imported lorafit, since imports take most of a short process."""

from multiprocessing import get_context

IMPORTED = get_context("forkserver")
# installed modules alone: the server does not search pytest's `pythonpath`, and says nothing of a failed import
IMPORTED.set_forkserver_preload(["lorafit.api.train", "lorafit.api.processes.launch", "lorafit.cli.app"])


def run_each(target, arguments, limit_s=240):
    """Run `target` in one process for each of `arguments`, and hold that all end well."""
    workers = [IMPORTED.Process(target=target, args=given) for given in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(limit_s)
        assert worker.exitcode == 0
