"""A server of forked processes that has imported lorafit, since imports take most of a short process."""

from multiprocessing import get_context

IMPORTED = get_context("forkserver")
# installed modules alone: the server does not search pytest's `pythonpath`, and says nothing of a failed import
IMPORTED.set_forkserver_preload(["lorafit.api.train", "lorafit.api.processes.launch", "lorafit.cli.app"])
