"""checkpoints: written on a separate thread, verified by a manifest, resumed bit-exactly."""
