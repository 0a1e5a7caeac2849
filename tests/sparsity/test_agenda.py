"""What happens when: against a slow, obvious walk over every step, and at every border by hand."""

import math
import subprocess
import sys
from fractions import Fraction as F
from itertools import pairwise
from math import floor, prod

import pytest

from raysparse.config import ConfigError
from raysparse.sparsity.agenda import Agenda, TopologyUpdate
from raysparse.sparsity.evolution import Gradual
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan

LAYERS = {"h.0.attn": (30, 10), "h.0.mlp": (40, 10), "h.1.attn": (30, 10), "h.1.mlp": (8, 5)}
ONE = {"w": (100, 10)}


def agenda(steps=100, shapes=ONE, tokens_per_step=1000, nnz=None, **sparsity):
    config = SparsityConfig.check({"target": 0.8} | sparsity)
    return Agenda(sparsity=config, shapes=shapes, steps=steps, tokens_per_step=tokens_per_step, seed=0, nnz=nnz or {})


UP = {"type": "polynomial"}
DOWN = {"type": "polynomial", "start": 1, "end": 0, "mirrored": True}
RIGL = {"type": "rigl", "update_interval": 10}


def mst(rule=None, lengths=(12, 61, 27), **sparsity):
    """Warm-up, ultra-sparsification and restoration, updates every 4 steps."""
    names, curves = ["warm_up", "ultra_sparsification", "restoration"], [UP, {"type": "constant"}, DOWN]
    timeline = [{"name": n, "length": length, "sparsity": c} for n, length, c in zip(names, lengths, curves, strict=True)]
    rule = {"type": "mixed", "update_interval": 4} | (rule or {})
    return agenda(**{"evolution": rule, "timeline": timeline, "shapes": LAYERS, "distribution": {"type": "er"}} | sparsity)


def test_needs_no_torch():
    """The process that decides starts in a fraction of the time."""
    code = "import raysparse.sparsity.agenda, sys; assert not {'torch', 'numpy', 'ray', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("steps", "lengths", "ends"),
    [
        (100, ["100 %"], [100]),
        (100, [60, "40 steps"], [60, 100]),
        (100, ["60k tokens", "0.04M tokens"], [60, 100]),
        (100, ["10 %", "80 %", "10 %"], [10, 90, 100]),
        (100, ["33.33333 %"] * 3, [33, 67, 100]),  # rounded as ends, not as lengths: those would be 33 each
        (10, ["25 %"] * 4, [3, 5, 8, 10]),  # 2.5 and 7.5, up
        (7, ["3_500 tokens", "3.5k tokens"], [4, 7]),
        (100, ["10 %", 55, "35k tokens"], [10, 65, 100]),
        (3, ["0.5 steps", "0.5 steps", 2], [1, None, 3]),  # the second would have no step of its own
    ],
)
def test_phases_in_steps(steps, lengths, ends):
    plan = agenda(steps, timeline=[{"name": f"p{i}", "length": length} for i, length in enumerate(lengths)])
    if None in ends:
        with pytest.raises(ConfigError, match=r"at least a step each and 3 steps together. Got ends at p0 1, p1 1, p2 3. Change"):
            _ = plan.spans
        return
    assert [span.end for span in plan.spans] == ends
    assert [span.first for span in plan.spans] == [0, *ends[:-1]]
    for step in range(steps + 1):
        expected = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
        assert plan.span(step) is plan.spans[expected]


def walk(plan, interval, target=F(4, 5), fraction=0.3):
    """MST, step by step: what `decide` should say in every step; None where nothing happens."""
    ends = [12, 73, 100]
    shapes = {
        "warm_up": lambda p: 1 - (1 - p) ** 3,
        "ultra_sparsification": lambda p: F(1),
        "restoration": lambda p: 1 - p**3,
    }
    begin, version, found = 0, 0, []
    for name, end in zip(shapes, ends, strict=True):
        number = len([s for s in range(begin, end) if s > begin and (s - begin) % interval == 0])
        done = 0
        for step in range(begin, end):
            if step == begin or (step - begin) % interval:
                found.append(None)
                continue
            done, version = done + 1, version + 1
            factor = shapes[name](F(done, number))
            nnz = SparsityPlan.build(plan.shapes, plan.sparsity, factor).nnz
            assert sum(nnz.values()) == floor((1 - factor * target) * 1040 + F(1, 2))
            found.append((step, version, name, dict(nnz), fraction / 2 * (1 + math.cos(math.pi * step / 100))))
        begin = end
    return found


@pytest.mark.parametrize("interval", [1, 3, 4, 11])
def test_mst_against_a_walk_over_every_step(interval):
    plan, version = mst({"update_interval": interval}), 0
    for step, expected in enumerate(walk(plan, interval)):
        assert plan.version(step) == version
        assert plan.is_update(step) == (expected is not None)
        if expected is None:
            with pytest.raises(AssertionError, match=f"step {step} has no update"):
                plan.decide(step)
            continue
        update = plan.decide(step)
        assert (update.step, update.version, update.phase, update.nnz) == expected[:4]
        assert update.drop_fraction == pytest.approx(expected[4], abs=1e-12)
        assert plan.plan(update.version) == update.nnz
        version += 1
    assert plan.version(100) == version == len(plan.update_steps)
    assert plan.plan(0) == {name: prod(shape) for name, shape in LAYERS.items()} == plan.plan(version)
    assert not plan.is_update(100)


def test_borders_by_hand():
    """Four updates a phase of five intervals: none in a phase's first step, none at its end."""
    timeline = [{"length": 50, "sparsity": UP}, {"length": 50}]
    plan = agenda(timeline=timeline, evolution={"type": "rigl", "update_interval": 10, "stop": "100 %", "drop_decay": "constant"})
    assert plan.update_steps == [10, 20, 30, 40, 60, 70, 80, 90]
    assert [plan.version(step) for step in (0, 10, 11, 40, 41, 50, 60, 61, 100)] == [0, 0, 1, 3, 4, 4, 4, 5, 8]
    assert [plan.factor(version) for version in range(6)] == [0, F(37, 64), F(7, 8), F(63, 64), 1, 1]
    assert [plan.plan(version)["w"] for version in range(6)] == [1000, 538, 300, 213, 200, 200]  # 537.5, up; 212.5, up
    assert plan.decide(40) == TopologyUpdate(step=40, version=4, phase="training", nnz={"w": 200}, drop_fraction=0.3, seed=0)


@pytest.mark.parametrize(
    ("rule", "updates"),
    [
        ({"type": "rigl"}, list(range(100, 750, 100))),  # 75 % is 750
        ({"type": "rigl", "update_interval": 250}, [250, 500]),  # no update at its stop
        ({"type": "rigl", "update_interval": 250, "stop": "75.1 %"}, [250, 500, 750]),
        ({"type": "set"}, list(range(100, 1000, 100))),
        ({"type": "mest", "update_interval": "300k tokens"}, [300, 600, 900]),
        ({"type": "mixed", "update_interval": "10 %", "start": "25 %", "stop": 600}, [350, 450, 550]),
        ({"type": "gradual", "update_interval": 333, "start": 1}, [334, 667]),
        ({"type": "one_shot"}, []),  # it makes the first topology
        ({"type": "static"}, []),
        ({"type": "zeros"}, []),
    ],
    ids=str,
)
def test_updates_of_each_rule(rule, updates):
    assert agenda(1000, evolution=rule).update_steps == updates


def test_windows_are_of_the_phase():
    timeline = [{"length": 300}, {"length": 700, "evolution": {"type": "rigl", "start": "10 %", "stop": "50 %"}}]
    plan = agenda(1000, evolution={"type": "set", "start": 50}, timeline=timeline)
    assert plan.update_steps == [150, 250, *range(300 + 70 + 100, 300 + 350, 100)]
    assert [span.rule.type for span in plan.spans] == ["set", "rigl"]
    cut = agenda(1000, evolution={"type": "set", "stop": 900}, timeline=timeline)  # longer than the first phase
    assert cut.update_steps == [100, 200, 470, 570]


def test_a_phase_without_updates_holds_what_the_one_before_it_reached():
    static = {"length": 40, "evolution": {"type": "static"}}
    plan = agenda(evolution=RIGL, timeline=[{"length": 60, "sparsity": UP}, static])
    assert plan.update_steps == [10, 20, 30, 40]
    assert plan.plan(4) == {"w": 200}
    with pytest.raises(ConfigError, match=r"whose sparsity moves\. Got none from static in 40 steps\."):
        _ = agenda(evolution=RIGL, timeline=[{"length": 60, "sparsity": UP}, static | {"sparsity": {"type": "constant", "value": 0}}]).spans


def cosine(fraction, progress):
    return pytest.approx(fraction / 2 * (1 + math.cos(math.pi * progress)), abs=1e-12)


def test_drop_fraction_over_the_run_or_restarted():
    timeline = [{"length": 400}, {"length": 600}]
    whole = agenda(1000, timeline=timeline, evolution={"type": "rigl", "start": 50})
    # one cosine from 50 to 400 + 75 % of 600; updates come at 150, 250 and from 550 on
    assert whole.update_steps == [150, 250, 550, 650, 750]
    assert [whole.decide(s).drop_fraction for s in whole.update_steps] == [cosine(0.3, (s - 50) / 800) for s in whole.update_steps]
    anew = agenda(1000, timeline=timeline, evolution={"type": "rigl", "start": 50, "drop_restart": True, "drop_fraction": 0.5})
    expected = [(150 - 50) / 250, (250 - 50) / 250, *((s - 450) / 400 for s in (550, 650, 750))]
    assert [anew.decide(s).drop_fraction for s in anew.update_steps] == [cosine(0.5, p) for p in expected]


def test_decay_leaves_out_phases_that_drop_nothing():
    gradual = {"type": "gradual", "update_interval": 50}
    timeline = [{"length": 500, "evolution": {"type": "static"}}, {"length": 400}, {"length": 100, "evolution": gradual}]
    plan = agenda(1000, timeline=timeline, evolution={"type": "mixed"})
    assert [plan.decide(s).drop_fraction for s in (600, 700, 800)] == [cosine(0.3, p) for p in (0.25, 0.5, 0.75)]


def test_other_drop_fractions():
    assert {agenda(1000, evolution={"type": "set"}).decide(s).drop_fraction for s in range(100, 1000, 100)} == {0.3}
    assert agenda(evolution=RIGL | {"drop_decay": "constant", "drop_fraction": 0.1}).decide(70).drop_fraction == 0.1
    gradual = agenda(evolution={"type": "gradual", "update_interval": 10}, timeline=[{"sparsity": UP}])
    assert {gradual.decide(step).drop_fraction for step in gradual.update_steps} == {0.0}


def test_one_shot_in_a_later_phase_prunes_in_its_first_step():
    dense = {"length": "30 %", "sparsity": {"type": "constant", "value": 0}, "evolution": {"type": "static"}}
    plan = agenda(evolution={"type": "one_shot"}, timeline=[dense, {"length": "70 %"}])
    assert plan.update_steps == [30]
    assert plan.decide(30) == TopologyUpdate(step=30, version=1, phase="training", nnz={"w": 200}, drop_fraction=0.0, seed=0)
    assert [plan.plan(version)["w"] for version in (0, 1)] == [1000, 200]


def test_totals_are_exact_and_distributions_recomputed_at_every_target():
    """With Erdos-Renyi shares the small layer is dense until the others have come down to its density."""
    plan = mst({"update_interval": 1}, shapes=LAYERS, target=0.9)
    saturated = set()
    for version in range(len(plan.update_steps) + 1):
        nnz, size = plan.plan(version), 1040
        assert sum(nnz.values()) == floor((1 - plan.factor(version) * F(9, 10)) * size + F(1, 2))
        open_ = [name for name, shape in LAYERS.items() if nnz[name] < prod(shape)]
        eps = {nnz[name] / sum(LAYERS[name]) for name in open_}  # live weights of an Erdos-Renyi layer are in proportion to this
        assert not eps or max(eps) - min(eps) < 0.16  # one weight of 13
        saturated.add(len(open_))
    assert saturated == {0, 3, 4}  # all dense; h.1.mlp dense; none dense
    uniform = mst({"update_interval": 1}, distribution={"type": "uniform"}, target=0.9)
    for version in range(1, len(uniform.update_steps)):
        density = 1 - uniform.factor(version) * F(9, 10)
        assert all(abs(nnz - density * prod(LAYERS[name])) <= 1 for name, nnz in uniform.plan(version).items())


def test_own_levels_move_with_the_curve():
    plan = mst(layers={"h.0.attn": 0.5, "h.1.attn": 1, "h.1.mlp": 0})
    levels = {"h.0.attn": F(1, 2), "h.1.attn": F(1), "h.1.mlp": F(0)}
    for version in range(len(plan.update_steps) + 1):
        nnz, factor = plan.plan(version), plan.factor(version)
        for name, level in levels.items():
            assert nnz[name] == floor((1 - factor * level) * prod(LAYERS[name]) + F(1, 2))
        assert nnz["h.0.mlp"] == floor((1 - factor * F(4, 5)) * 400 + F(1, 2))
    assert plan.plan(2)["h.1.attn"] == 0


def test_given_masks_keep_their_plan():
    nnz = {"h.0.attn": 7, "h.0.mlp": 0, "h.1.attn": 300, "h.1.mlp": 1}
    plan = agenda(shapes=LAYERS, nnz=nnz, masks="earlier", target=0, evolution=RIGL)
    assert plan.update_steps == [10, 20, 30, 40, 50, 60, 70]
    assert all(plan.plan(version) == nnz for version in range(8))
    assert plan.decide(30).nnz == nnz


@pytest.mark.parametrize(
    ("rule", "first", "given"),
    [("zeros", None, True), ("zeros", "rigl", False), ("rigl", "zeros", True), ("rigl", None, False)],
)
def test_zeros_in_the_first_phase_are_given(rule, first, given):
    timeline = [{"length": 50, "evolution": first and {"type": first}}, {"length": 50}]
    assert SparsityConfig.check({"evolution": {"type": rule}, "timeline": timeline}).given == given


MOVING = [{"length": 40, "sparsity": UP}, {"length": 60}]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"timeline": [{"name": "a", "length": 40}, {"name": "b", "length": "59 %"}]},
            "Expected the phases of sparsity.timeline to last at least a step each and 100 steps together. Got ends at a 40, b 99. "
            "Change their length.",
        ),
        (
            {"timeline": [{"name": "a", "length": 0}, {"name": "b", "length": 100}]},
            "100 steps together. Got ends at a 0, b 100. Change their length.",
        ),
        ({"timeline": [{"name": "a", "length": "2_000k tokens"}]}, "Got ends at a 2,000. Change their length."),
        (
            {"timeline": [{"name": "a", "length": "1 epoch"}]},
            "Expected steps or tokens. Got '1 epoch', but pre-training text has no epochs. Write it in tokens.",
        ),
        (
            {"evolution": {"type": "rigl", "update_interval": "2 epochs"}},
            "Expected steps or tokens. Got '2 epochs', but pre-training text has no epochs. Write it in tokens.",
        ),
        (
            {"evolution": {"type": "set", "update_interval": 0}},
            "Expected evolution set to start before it stops, with an update_interval of a step or more. Got start '0 steps', "
            "stop '100 %', update_interval '0 steps' in a phase of 100 steps. Change them.",
        ),
        (
            {"evolution": {"type": "rigl", "start": "80 %"}},
            "Got start '80 %', stop '75 %', update_interval '100 steps' in a phase of 100 steps. Change them.",
        ),
        (
            {"timeline": MOVING, "evolution": {"type": "static"}},
            "Expected updates in phase training, whose sparsity moves. Got none from static in 40 steps. "
            "Choose another evolution, a smaller update_interval or another curve.",
        ),
        ({"timeline": MOVING, "evolution": {"type": "set", "update_interval": 40}}, "Got none from set in 40 steps."),
        (
            {"timeline": [{"length": 50}, {"length": 50, "sparsity": {"type": "constant", "value": 0.5}}]},
            "Expected updates in phase training, whose sparsity moves. Got none from static in 50 steps.",
        ),
        ({"timeline": [{"sparsity": UP}], "evolution": {"type": "one_shot"}}, "Got none from one_shot in 100 steps."),
        (
            {"timeline": [{"name": "up_and_down", "sparsity": DOWN}], "evolution": {"type": "gradual", "update_interval": 10}},
            "Expected a rule that grows weights in phase up_and_down, whose sparsity falls. Got gradual, which only drops. "
            "Use set, rigl, mest or mixed.",
        ),
        (
            {
                "timeline": [{"length": 50}, {"length": 50, "sparsity": {"type": "constant", "value": 0.9}}],
                "evolution": {"type": "gradual", "update_interval": 10},
            },
            "Got gradual, which only drops.",
        ),
        (
            {"timeline": [{"name": "a", "sparsity": UP}], "nnz": {"w": 5}, "evolution": RIGL},
            "Expected a constant sparsity where the masks are given. Got the curve {'type': 'polynomial', 'start': 0.0, 'end': 1.0, "
            "'power': 3, 'mirrored': False} in phase a. Drop sparsity.masks (and evolution zeros), or the curve.",
        ),
        (
            {"timeline": [{"sparsity": {"type": "constant", "value": 0.5}}], "nnz": {"w": 5}},
            "Expected a constant sparsity where the masks are given. Got the curve {'type': 'constant', 'value': 0.5}",
        ),
    ],
)
def test_what_is_refused(config, text):
    with pytest.raises(ConfigError) as error:
        _ = agenda(**config).spans
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("sparsity", "problem"),
    [
        ({"timeline": []}, "timeline: Tuple should have at least 1 item"),
        ({"timeline": [{"name": "Warm up"}]}, "name: String should match pattern"),
        ({"evolution": {"type": "rigl", "drop_fraction": 1.5}}, "evolution.drop_fraction: Input should be less than or equal to 1"),
        ({"evolution": {"type": "mixed", "gradient_share": -0.5}}, "evolution.gradient_share: Input should be greater than or equal to 0"),
        ({"evolution": {"type": "mest", "gradient_weight": -1}}, "evolution.gradient_weight: Input should be greater than or equal to 0"),
        ({"evolution": {"type": "rigl", "update_interval": "often"}}, "evolution.update_interval: Expected a length such as '100 steps'"),
        ({"evolution": {"type": "static", "update_interval": 5}}, "evolution.update_interval: no such key"),
        ({"evolution": {"type": "snip"}}, "Input tag 'snip' found using 'type' does not match any of the expected tags: 'static', 'set'"),
    ],
)
def test_config_out_of_range(sparsity, problem):
    with pytest.raises(ConfigError) as error:
        SparsityConfig.check(sparsity)
    assert problem in str(error.value)


@pytest.mark.parametrize("decay", [{}, {"drop_restart": True}, {"drop_decay": "constant", "drop_fraction": 0.1}])
def test_json_round_trip_decides_alike(decay):
    plan = mst({"update_interval": 2} | decay, layers={"h.1.attn": 0.3})
    other = Agenda.model_validate_json(plan.model_dump_json())
    assert other == plan
    assert other.update_steps == plan.update_steps
    for step in reversed(plan.update_steps):  # whatever the order of asking
        assert other.decide(step) == plan.decide(step) == Agenda.check(plan.model_dump(mode="json")).decide(step)
    given = agenda(nnz={"w": 5}, masks="earlier", target=0, evolution=RIGL)
    assert Agenda.model_validate_json(given.model_dump_json()).decide(10) == given.decide(10)


def test_attention_follows_the_phases():
    timeline = [{"length": 40, "attention": {"type": "local_or_strided"}}, {"length": 60}]
    plan = agenda(timeline=timeline)
    assert [plan.attention(step).type for step in (0, 39, 40, 99, 100)] == ["local_or_strided", "local_or_strided", "full", "full", "full"]


def test_a_rising_plan_may_give_a_layer_a_weight_more():
    """Why rules that only drop need a grow score all the same: rounding is to the largest fractions, whichever those are then."""
    shapes = dict.fromkeys("abcde", (7, 11)) | {"f": (3, 5)}
    plan = agenda(4000, shapes, evolution=Gradual(update_interval="10 steps").model_dump(), timeline=[{"sparsity": UP}])
    plans = [plan.plan(version) for version in range(len(plan.update_steps) + 1)]
    totals = [sum(nnz.values()) for nnz in plans]
    assert totals == sorted(totals, reverse=True)
    assert any(later[name] > nnz[name] for nnz, later in pairwise(plans) for name in shapes)


def test_plans_of_a_long_run_are_not_all_remembered():
    long = mst({"update_interval": 1}, lengths=(300, 100, 300), steps=700)
    first = [long.decide(step) for step in long.update_steps]
    assert len({tuple(update.nnz.values()) for update in first}) > 100
    assert len(long._cache) <= 16
    assert [long.decide(step) for step in long.update_steps] == first
