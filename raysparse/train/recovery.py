"""How a run begins, goes on, and goes back: always from the newest checkpoint; and what it does about a step that gave a NaN."""

from pathlib import Path

from raysparse.config import ConfigError
from raysparse.sparsity.flops import Ledger
from raysparse.sparsity.manager import MaskManager
from raysparse.train.error import TrainingError
from raysparse.train.state import HISTORY, State, Training

MOST_LEFT_OUT = 10
"""Steps in a row whose gradients are thrown away; one more and the run ends: it is not the data of a step."""


def resume(t: Training) -> State:
    """Load the newest checkpoint, or begin with what is there; have the topology audited, drop what was said of later steps.

    Every rank calls this: at the start of a run, and when it goes back in the middle.
    """
    state, history, found = State(), "", t.checkpointer.newest()
    if found is not None:
        extra = t.checkpointer.load(found)
        state, t.ledger = State(**extra["state"]), Ledger.from_dict(extra["ledger"])
        history = "" if t.topology is None else read_history(found)
        t.run.show({"text": f"{t.stage}: going on from {found.name}"})
    if t.keeper is not None:
        t.keeper.begin(state.step, history)
        if found is not None:
            t.keeper.published(str(found), state.step)
    t.saved, t.saved_step = None, state.step
    t.meter.begin(state.step)
    t.sharded.wire.forget()
    t.follow()
    return state


def read_history(found: Path) -> str:
    """What a checkpoint knows of the topology up to it (`MaskManager.text`)."""
    file = found / HISTORY
    if not file.exists():
        raise ConfigError(
            f"Expected {HISTORY} in the checkpoint {found}. Got none: it is of a version of raysparse that did not keep a history. "
            f"Choose another run.name; sparsity.masks={found} starts from its masks."
        )
    return MaskManager(file).text()


def bad_step(t: Training, state: State) -> State | None:
    """What `training.on_nan` says of a step whose gradients are not finite; nothing was stepped on. Every rank calls this.

    With roll_back a step is tried once more from the newest checkpoint: what was a glitch is then as if it had not been. Bad again, it
    is in the data, and is left out.

    Returns:
        The state to go on from in the place of this one, or None: the step is left out, and the next one comes.
    """
    step, policy = state.step, t.config.on_nan
    if policy == "stop":
        raise TrainingError(
            f"Expected finite gradients in step {step + 1} of {t.stage}. Got a NaN or infinity. "
            "Lower optimizer.lr, lengthen schedule.warmup, or look at the data of this step; the last checkpoint is kept, and the same "
            "command with training.on_nan=skip or roll_back goes on from it."
        )
    if policy == "roll_back" and step not in t.tried_again:
        t.tried_again.add(step)
        problem = t.checkpointer.wait()
        found = t.checkpointer.newest()
        if found is None:
            raise TrainingError(
                f"Expected a checkpoint to go back to from step {step + 1} of {t.stage}, which gave a NaN or infinity. Got none"
                f"{f': {problem}' if problem else ''}. See whether {t.checkpointer.path(0).parent} can be written."
            )
        t.run.show({"text": f"{t.stage}: step {step + 1} gave a NaN or infinity; it is tried once more, from {found.name}"})
        state = resume(t)
        _tell(t, state, "rolled_back", step)
        return state
    state.left_out.append(step)
    if all(step - n in state.left_out for n in range(MOST_LEFT_OUT + 1)):
        raise TrainingError(
            f"Expected at most {MOST_LEFT_OUT} steps in a row without finite gradients. Got one more, up to step {step + 1} of {t.stage}. "
            "Lower optimizer.lr, or lengthen schedule.warmup: the weights have diverged. The last checkpoint is kept."
        )
    t.run.show({"text": f"{t.stage}: step {step + 1} gave a NaN or infinity{' again' * (policy == 'roll_back')}; it is left out"})
    _tell(t, state, "left_out", step)
    return None


def _tell(t: Training, state: State, event: str, step: int) -> None:
    record = {"stage": t.stage, "step": state.step, "steps": t.pace.steps, "event": event, "bad_step": step + 1}
    t.meter.write(record, {})
