"""Made-up recordings."""

import io
import wave

import numpy as np
from numpy.typing import NDArray

RATE = 16_000


def wav(samples: NDArray[np.float64], rate: int = RATE, channels: int = 1) -> bytes:
    """A 16-bit file of samples in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def tone(seconds: float = 0.5, hertz: float = 440.0, rate: int = RATE) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
