"""What the tests of the defenses share: an augmentation that spoils images, and a clock that moves when looked at."""


def nan_from(call):
    """An augmentation whose calls from the given one on spoil the images."""
    calls = []

    def spoil(images, generator):
        calls.append(1)
        return images * float("nan") if len(calls) >= call else images

    return spoil


class Clock:
    """Each look at it takes `step` seconds."""

    def __init__(self, step):
        self.seconds, self.step = 0.0, step

    def __call__(self):
        self.seconds += self.step
        return self.seconds
