"""Lengths as people write them, and what they come to in steps."""

import pytest

from raysparse.config import Config, ConfigError
from raysparse.length import Length, Scale, steps


class Holder(Config):
    length: Length = "1 step"


# 1 step = 1,000 tokens, 1 epoch = 30 steps, the run has 200 steps.
SCALE = Scale(1000, 30, 200)


@pytest.mark.parametrize(
    ("written", "num_steps"),
    [
        (100, 100), (0, 0), ("100 steps", 100), ("1 step", 1), ("4768steps", 4768), ("  7  steps ", 7),
        ("1_000 steps", 1000), ("2k steps", 2000),
        ("5000 tokens", 5), ("5k tokens", 5), ("375M tokens", 375_000), ("2.5e9 tokens", 2_500_000), ("2.5e+9 tokens", 2_500_000),
        ("2.5G tokens", 2_500_000), ("2.5B tokens", 2_500_000), ("1 token", 1), ("0 tokens", 0),
        ("1 epoch", 30), ("5 epochs", 150), ("0.5 epochs", 15), ("2.5 epochs", 75),
        ("10 %", 20), ("10%", 20), ("100 %", 200), ("0 %", 0), ("12.5 %", 25), ("0.29 %", 1),
        # to the nearest, halves up, but never to 0 what is not 0
        ("1499 tokens", 1), ("1500 tokens", 2), ("2499 tokens", 2), ("499 tokens", 1),
        ("0.01 steps", 1), ("0.1 %", 1), ("1.1 %", 2), ("1.25 %", 3),
    ],
)  # fmt: skip
def test_forms(written, num_steps):
    assert steps(Holder.check({"length": written}).length, SCALE) == num_steps


@pytest.mark.parametrize(
    "written",
    ["", "steps", "ten steps", "-1 steps", "1.5.2 steps", "1e steps", "e9 tokens", "_1 steps", "100", "100 step s",
     "100 epoch steps", "375m tokens",
     "10 percent", "1e-3 tokens", "nan steps", "inf steps", True, 1.5, None, [1]],
)  # fmt: skip
def test_other_forms_are_refused(written):
    with pytest.raises(ConfigError) as error:
        Holder.check({"length": written})
    assert str(error.value) == (
        "Expected a valid Holder. Got 1 problem:\n"
        "  length: Expected a length such as '100 steps', '2.5e9 tokens', '375M tokens', '5 epochs' or '10 %' "
        f"(got {written!r})\n"
        "Correct these keys; `raysparse VERB --keys` explains every key."
    )


def test_a_bare_number_is_kept_as_text():
    assert Holder.check({"length": 500}).length == "500 steps"
    assert Holder.check(Holder(length="500 steps").model_dump()).length == "500 steps"


def test_epochs_of_a_stream():
    text = r"^Expected steps or tokens\. Got '5 epochs', but pre-training text has no epochs\. Write it in tokens\.$"
    with pytest.raises(ConfigError, match=text):
        steps("5 epochs", Scale(1000, None, 200))


def test_share_of_the_run_that_is_being_defined():
    text = r"^Expected steps, tokens or epochs\. Got '10 %' of the run whose length this is\. Write it in tokens\.$"
    with pytest.raises(ConfigError, match=text):
        steps("10 %", Scale(1000, 30, None))


@pytest.mark.parametrize(
    ("tokens_per_step", "tokens", "num_steps", "warmup"),
    [
        (256 * 2048, "2.5e9 tokens", 4_768, 715),  # SPDF's GPT-2 small: 4,768.4 and 715.3
        (512 * 2048, "26e9 tokens", 24_796, 358),  # SPDF's GPT-3 XL: 24,795.5 and 357.6
    ],
)
def test_spdf(tokens_per_step, tokens, num_steps, warmup):
    scale = Scale(tokens_per_step)
    assert steps(tokens, scale) == num_steps
    assert steps("375M tokens", scale) == warmup


def test_exact_beyond_floating_point():
    assert steps("9_007_199_254_740_993 tokens", Scale(1)) == 2**53 + 1
    assert steps("0.29 %", Scale(1, None, 100_000)) == 290
