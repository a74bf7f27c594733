"""A listener that ends the process in the middle of a stage, as Ctrl-C or a crash would."""

from lowbit.core.progress import Silent


class StopAt(Silent):
    """Raises KeyboardInterrupt when the named stage has made so many steps and makes one more."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.now = stage, steps, ""

    def start(self, what: str, total: int) -> None:
        self.now = what

    def advance(self) -> None:
        if self.now == self.stage:
            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt
