"""The verbs as functions: what the command line and Python callers both use. Each file is one verb.

Nothing is imported here, so that `check` and `plan` stay free of torch.
"""
