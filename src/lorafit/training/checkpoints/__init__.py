"""checkpoints: written on a thread of their own, verified by a manifest, resumed bit-exactly."""
