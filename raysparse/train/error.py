"""How training ends when it cannot go on."""


class TrainingError(RuntimeError):
    """The run cannot go on, and starting it again would end the same way."""
