"""Autotune: the fastest memory policy for this GPU, measured, solved and proved before the first step."""
