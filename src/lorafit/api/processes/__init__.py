"""processes: a run on several GPUs, started by torch's launcher and led by process 0."""
