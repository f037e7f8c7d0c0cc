"""decoding: many answers at once from one model, each row with its own adapter."""

from lorafit.serve.decoding.batch import BatchDecoder
from lorafit.serve.decoding.generation import EngineStopped, Generation
from lorafit.serve.decoding.sampling import Chosen, Sampling, choose
from lorafit.serve.decoding.scheduler import Scheduler

__all__ = ["BatchDecoder", "Chosen", "EngineStopped", "Generation", "Sampling", "Scheduler", "choose"]
