"""How training ends before its end."""


class TrainingError(RuntimeError):
    """The run cannot go on, and starting it again would end the same way."""


class Left(RuntimeError):
    """The run was told to leave: it has saved its last step, and the same command goes on from there."""
