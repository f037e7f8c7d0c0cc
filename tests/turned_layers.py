"""What turning a policy needs of the decoder layers, without a model."""

from lorafit.config.memory_policy import MemoryPolicy


class TurnedLayers:
    """`count` layers that remember the policy and the schedule they were given."""

    def __init__(self, count: int = 32) -> None:
        self.policy, self.schedule, self.less, self.count = MemoryPolicy(), None, None, count

    def __len__(self):
        return self.count

    def set_schedule(self, schedule, less=None):
        self.schedule, self.less = schedule, less
