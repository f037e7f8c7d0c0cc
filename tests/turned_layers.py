"""What turning a dial needs of the decoder layers, without a model."""

from lorafit.config.dial import Dial


class TurnedLayers:
    """`count` layers that remember the dial and the schedule they were given."""

    def __init__(self, count: int = 32) -> None:
        self.dial, self.schedule, self.less, self.count = Dial(), None, None, count

    def __len__(self):
        return self.count

    def follow(self, schedule, less=None):
        self.schedule, self.less = schedule, less
