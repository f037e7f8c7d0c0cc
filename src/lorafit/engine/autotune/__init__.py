"""Autotune: the fastest memory policy for this GPU.

It is measured, solved and checked by a dry run before the first step.
"""
