"""Screening rejects what is no loss, says why, and keeps what is one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cse_autoloss import Expression, SpaceError, load_space, screen, verify
from cse_autoloss.cli import cli
from cse_autoloss.errors import UserError
from cse_autoloss.screening import ACCEPTED, DUPLICATE, PROPERTIES, Screener, Seen, sampling
from cse_autoloss.screening.equivalence import fingerprint
from cse_autoloss.screening.graph import Arrays, Graph, representatives
from cse_autoloss.screening.predictions import draw_batch, gradients
from cse_autoloss.screening.properties import violations
from cse_autoloss.space import space_names
from cse_autoloss.variation import Population, grow

SPACES = [load_space(name) for name in space_names()]
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
TWO, ONE, REG = (load_space(name) for name in ("two_stage_cls", "one_stage_cls", "reg"))
ONE_PLUS = load_space("one_stage_cls_plus")
seeds = st.integers(0, 2**32 - 1)


def parse(text, space):
    return Expression.parse(text, space)


# --- verdicts ---


@pytest.mark.parametrize(
    "space, name", [(space, name) for space in SPACES for name in space.losses]
)
def test_every_known_loss_passes_but_one_that_is_known_to_miss_a_property(space, name):
    misses = {"NWD": "not-flat"}  # made for objects of some 13 pixels
    verdict = verify(space.losses[name].expression, space)
    assert verdict.failed == misses.get(name), verdict.detail


@pytest.mark.parametrize(
    "space, text, failed",
    [
        (TWO, "Dot(Y,Z)", "uses-prediction"),
        (REG, "Add(1,2)", "uses-prediction"),
        (TWO, "Dot(Y,Sqrt(X))", "finite-values"),
        (REG, "Log(Sub(I,U))", "finite-values"),
        (TWO, "Sqrt(Relu(Neg(Dot(Y,X))))", "finite-gradients"),
        (TWO, "Dot(Y,Log(Softmax(X)))", "monotonicity"),  # cross-entropy upside down
        (ONE, "Mul(PY,Log(Sig(X)))", "monotonicity"),
        (REG, "Div(I,U)", "monotonicity"),
        (REG, "Sin(Div(I,U))", "monotonicity"),
        (TWO, "Neg(Dot(Y,X))", "convergence"),  # pulls for ever
        (ONE, "Mul(X,Sub(NY,PY))", "convergence"),
        (TWO, "Sub(X,X)", "not-flat"),
        (REG, "Div(U,U)", "not-flat"),
        (ONE, "Neg(Mul(PY,Log(Sig(X))))", "not-flat"),  # nothing pushes the others down
        (REG, "Sub(U,I)", "not-flat"),  # next to the largest boxes, the smallest get nothing
    ],
)
def test_what_is_no_loss_falls_to_the_property_that_it_lacks(space, text, failed):
    verdict = verify(parse(text, space), space)
    assert not verdict.accepted and verdict.failed == failed, verdict.detail


@pytest.mark.parametrize(
    "space, value, slope", [(REG, 0.01, None), (TWO, 0.25, 0.1), (ONE, 0.25, 0.1)], ids=str
)
def test_a_loss_may_lie_so_high_and_be_so_steep_where_the_prediction_is_right(space, value, slope):
    """As shares of its range and of its greatest slope; twice as much is too much."""
    probes = Screener(space).probes
    blocks = [block for block in probes.blocks if block.held and block.settled.any()]
    assert blocks
    for block in blocks:
        groups, sweeps, steps = block.shape
        falling = np.tile(np.clip(np.linspace(1, -0.5, steps), 0, 1), groups * sweeps)
        flat = np.where(block.settled, 0.0, -1.0)

        def converges(height, steepness):
            values = np.where(block.settled, height, falling)[:, None]
            slopes = np.where(block.settled, steepness, flat)[:, None]
            found = dict(violations(values, slopes, block, probes.tolerances))
            return not found["convergence"].any()

        assert converges(0.9 * value, 0) and not converges(2 * value, 0)
        if slope is not None:
            assert converges(0, 0.9 * slope) and not converges(0, 2 * slope)


BCE_TO = "Neg(Add(Mul({t},Log(Sig(X))),Mul(Sub(1,{t}),Log(Sub(1,Sig(X))))))"
IA_TARGET = "Detach(Mul(Pow(Sig(X),0.25),Pow(Q,0.75)))"  # of a positive; a negative's is 0


@pytest.mark.parametrize(
    "text",
    [
        str(ONE.losses["QualityFocal"].expression),
        BCE_TO.format(t="Q"),  # soft-IoU targets
        BCE_TO.format(t="Mul(Q,Sqrt(Q))"),  # MAL without its weights
        "Mul(Sub(Q,Sig(X)),Sub(Q,Sig(X)))",
        f"Add(Mul(PY,{BCE_TO.format(t=IA_TARGET)}),Mul(NY,Neg(Log(Sub(1,Sig(X))))))",  # IA-BCE
    ],
)
def test_a_loss_whose_best_score_is_the_iou_is_verified_as_such(text):
    verdict = verify(parse(text, ONE_PLUS), ONE_PLUS)
    assert verdict.accepted and "best score of a positive rises with its IoU" in verdict.detail


def test_a_two_stage_loss_may_want_a_score_well_below_1():
    """Half a Brier score trains a detector's head as well as cross-entropy (docs/screening.md)."""
    squares = "Dot(Softmax(X),Softmax(X))"
    assert verify(parse(f"Sub({squares},Dot(Y,Softmax(X)))", TWO), TWO).accepted
    assert not verify(parse(f"Sub(Mul(2,{squares}),Dot(Y,Softmax(X)))", TWO), TWO).accepted


@pytest.mark.parametrize("text", ["Neg(Div(I,Sqrt(U)))", "Exp(Div(E,I))", "Sig(Div(E,I))"])
def test_a_loss_of_lengths_passes_and_so_does_one_that_is_steepest_by_far_where_it_is_worst(text):
    assert verify(parse(text, REG), REG).accepted


def test_a_label_may_be_smoothed():
    for share, accepted in ((0.05, True), (0.5, False)):
        target = f"Add({share},Mul({1 - 2 * share:g},PY))" if share < 0.5 else "0.5"
        verdict = verify(parse(BCE_TO.format(t=target), ONE_PLUS), ONE_PLUS)
        assert verdict.accepted is accepted, verdict.detail
        assert "best score" not in verdict.detail


def test_what_is_detached_is_no_part_of_the_descent():
    """A factor without gradient weighs; what it does to the value says nothing."""
    entropy = BCE_TO.format(t="PY")
    weighed = f"Mul(Detach(Sub(3,Add(Sig(X),PY))),{entropy})"
    assert verify(parse(weighed, ONE_PLUS), ONE_PLUS).accepted
    assert verify(parse(f"Add({entropy},Mul(3,Detach(X)))", ONE_PLUS), ONE_PLUS).accepted
    nothing = verify(parse(f"Detach({entropy})", ONE_PLUS), ONE_PLUS)
    assert nothing.failed == "not-flat"


def test_at_other_ious_there_must_be_one_best_score():
    wobble = "Mul(Mul(PY,Sub(1,Q)),Mul(3,Sin(Mul(2,X))))"
    verdict = verify(parse(f"Add({BCE_TO.format(t='Q')},{wobble})", ONE_PLUS), ONE_PLUS)
    assert verdict.failed == "convergence" and "positive of IoU 0" in verdict.counterexample.sweep


def test_a_quality_aware_loss_has_its_properties_at_iou_1_and_must_be_finite_everywhere():
    broken = parse(
        f"Add({ONE.losses['QualityFocal'].expression},Log(Sub(Mul(2,Q),Mul(PY,1))))", ONE
    )
    verdict = verify(broken, ONE)
    assert verdict.failed == "finite-values" and "IoU 0," in verdict.counterexample.sweep


@pytest.mark.parametrize("space", [TWO, ONE, REG], ids=lambda space: space.name)
def test_a_counterexample_is_one(space):
    """Its numbers are those that torch gives for the variables that it names."""
    report = screen(grow(np.random.default_rng(0), 3000, space), space)
    screener = Screener(space)
    fallen = np.flatnonzero(report.codes == PROPERTIES.index("monotonicity"))[:40]
    assert len(fallen) == 40
    for expression in report.population.take(fallen).expressions():
        verdict = screener.verify(expression)
        trace = verdict.counterexample
        here, before = trace.values[trace.at], trace.values[: trace.at]
        assert trace.slopes[trace.at] > 0 or here > min(before), verdict.detail
        variables = {name: torch.tensor([numbers]) for name, numbers in trace.variables.items()}
        loss = expression.fold(
            lambda name: (
                variables.get(name) if name in variables else torch.full((1, 1), float(name))
            ),
            lambda primitive, args: primitive.torch(*args),
        )
        if space is ONE:
            loss = loss * (0.75 - 0.5 * variables["PY"])
        assert float(loss.sum()) == pytest.approx(trace.values[trace.at], rel=1e-3, abs=1e-4)


# --- the graph ---


@spaces
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_gradients_of_the_shared_graph_are_those_of_torch(space, seed):
    rng = np.random.default_rng(seed)
    population = grow(rng, 40, space, 1, 5)
    batch = draw_batch(space, rng, 6)
    found = gradients(
        Graph.of_population(population),
        batch,
        batch.initial,
        Arrays(dtype="float64"),
    )
    compared = []
    for expression, gradient in zip(population.expressions(), found):
        expected, shaken = (torch_gradient(expression, space, batch, by) for by in (0, 1e-12))
        if expected is None or shaken is None or not np.isfinite(expected).all():
            continue
        largest = max(1, abs(expected).max())
        if np.allclose(shaken, expected, rtol=1e-5, atol=1e-7 * largest):  # no matter of last bits
            # Sqrt(Relu(X)) is 0 / 0 in forward mode where X is negative
            finite = np.isfinite(gradient)
            assert gradient[finite] == pytest.approx(expected[finite], rel=1e-4, abs=1e-6 * largest)
            compared.append(finite.mean())
    assert len(compared) > 10 and np.mean(compared) > 0.8


def torch_gradient(expression, space, batch, shake=0.0):
    """None where a value is undefined, or so large that its last bits decide. Each operator's value
    is off by another small multiple of ``shake``, a share of it."""
    predictions = torch.tensor(batch.initial, requires_grad=True)
    if space.branch == "reg":
        size = torch.tensor(batch.targets)
        centre, half = predictions[:, :2] * size, predictions[:, 2:].exp() * size / 2
        low, high, edge = centre - half, centre + half, size / 2
        overlap = (torch.minimum(high, edge) - torch.maximum(low, -edge)).clamp(min=0).prod(1)
        enclosing = (torch.maximum(high, edge) - torch.minimum(low, -edge)).prod(1)
        union = (2 * half).prod(1) + size.prod(1) - overlap
        union = union.clamp(min=1e-7)
        overlap = torch.maximum(overlap, 1e-6 * union)
        variables = {"U": union, "I": overlap, "E": enclosing.clamp(min=1e-7)}
        unit = size.prod(1).sqrt()
        around = torch.maximum(high, edge) - torch.minimum(low, -edge)
        for pair, sides in (
            (("DX", "DY"), centre),
            (("WP", "HP"), 2 * half),
            (("WT", "HT"), size),
            (("EW", "EH"), around),
        ):
            variables.update(zip(pair, (sides / unit[:, None]).unbind(1)))
        if batch.image_sizes is not None:
            image = torch.tensor(batch.image_sizes, dtype=torch.float64)
            variables |= {"A": size.prod(1) / image.prod(1), "D": image.norm(dim=1) / unit}
    else:
        labels, ious = torch.tensor(batch.labels), torch.tensor(batch.ious)[:, None]
        variables = {
            "X": predictions,
            "Y": labels,
            "Z": ious.expand_as(labels),
            "PY": labels,
            "NY": 1 - labels,
            "Q": labels * ious,
            **{name: torch.tensor(array) for name, array in batch.further.items()},
        }
    constant = (1,) * variables[next(iter(space.variables))].dim()
    largest = [0.0]

    def node(primitive, args):
        value = primitive.torch(*args) * (1 + shake * len(largest))
        largest.append(float(value.detach().abs().max()))
        return value

    def leaf(name):
        return (
            variables[name]
            if name in variables
            else torch.full(constant, float(name), dtype=torch.float64)
        )

    value = expression.fold(leaf, node)
    if space.inputs == "one_stage":
        value = value * (0.25 * variables["PY"] + 0.75 * variables["NY"])
    (gradient,) = torch.autograd.grad((value + 0 * predictions.sum()).sum(), predictions)
    return gradient.numpy() if max(largest) < 1e12 and not np.isnan(largest).any() else None


@spaces
def test_torch_tensors_give_the_verdicts_of_numpy_arrays(space):
    population = grow(np.random.default_rng(4), 4000, space)
    ours, theirs = (
        Screener(space, device=device).screen(population).codes for device in (None, "cpu")
    )
    assert np.mean(ours == theirs) > 0.99  # which property falls may hang on a last bit
    assert ((ours == ACCEPTED) == (theirs == ACCEPTED)).all()


@spaces
def test_screening_agrees_with_verification_one_by_one(space):
    """Sharing a graph with others, and the size of the batch, change no verdict."""
    population = grow(np.random.default_rng(6), 3000, space)
    report = Screener(space, batch_size=700).screen(population)
    assert (report.codes == Screener(space, batch_size=4096).screen(population).codes).all()
    screener = Screener(space)
    for row in [*np.flatnonzero(report.codes == ACCEPTED), *range(300)]:
        if report.codes[row] != DUPLICATE:
            failed = screener.verify(population.expression(row)).failed
            assert failed == (
                None if report.codes[row] == ACCEPTED else PROPERTIES[report.codes[row]]
            )


def test_equal_subexpressions_are_one_node_whatever_the_order_of_commutative_arguments():
    texts = [
        "Mul(Add(U,I),Sqrt(E))",
        "Mul(Sqrt(E),Add(I,U))",
        "Sub(Add(I,U),Sqrt(E))",
        "Sub(Sqrt(E),Add(U,I))",
    ]
    population = Population.from_expressions([parse(text, REG) for text in texts], REG)
    graph = Graph.of_population(population)
    assert graph.roots[0] == graph.roots[1] and graph.roots[2] != graph.roots[3]
    assert len(graph) == len({"U", "I", "E", "Add", "Sqrt", "Mul", "Sub", "Sub'"})


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=60).flatmap(
        lambda x: st.lists(st.sampled_from(x or [0]), max_size=300)
    )
)
def test_equal_hashes_have_one_representative(hashes):
    found = representatives(np.array(hashes, np.uint64))
    assert all(hashes[i] == hashes[j] for i, j in enumerate(found))
    assert len(set(found.tolist())) == len(set(hashes))


@spaces
def test_more_than_99_percent_of_random_candidates_are_rejected(space):
    report = screen(grow(np.random.default_rng(8), 60_000, space), space)
    assert 0 < len(report.survivors) < 0.01 * report.unique
    assert (
        sum(report.rejected.values()) + len(report.survivors)
        == report.unique
        <= report.generated
        == 60_000
    )


def test_memory_is_bounded_by_the_batch_size():
    import tracemalloc

    def peak(batch_size):
        screener = Screener(REG, batch_size)
        population = grow(np.random.default_rng(0), 40_000, REG)
        tracemalloc.start()
        screener.screen(population)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    assert peak(2000) < 0.4 * peak(40_000)


# --- what was seen ---


@given(st.lists(st.lists(st.integers(0, 50) | st.integers(0, 2**64 - 1), max_size=80), max_size=5))
def test_seen_tells_new_from_old_like_a_set(batches):
    seen, reference = Seen(4), set()
    for batch in batches:
        expected = []
        for value in batch:
            value = max(value, 1)  # 0 counts as 1
            expected.append(value not in reference)
            reference.add(value)
        assert seen.add(np.array(batch, np.uint64)).tolist() == expected
        seen = Seen.from_json(seen.to_json())
    assert len(seen) == len(reference)


def test_what_an_earlier_screening_saw_is_a_duplicate_after_a_restart():
    first, second = Screener(TWO), grow(np.random.default_rng(1), 500, TWO)
    once = first.screen(second)
    again = Screener(TWO, seen=first.seen.to_json()).screen(second)
    assert once.unique > 0 and again.unique == 0 and again.survivors == []
    assert len(once.fates()) + len(once.survivors) == once.unique


def test_seen_refuses_a_text_that_is_no_set():
    with pytest.raises(ValueError, match="cut short"):
        Seen.from_json(Seen().to_json() + "QUJD")


# --- equivalence ---


@pytest.mark.parametrize(
    "space, same",
    [
        (
            TWO,
            [
                "Neg(Dot(Y,Log(Softmax(X))))",
                "Add(3,Neg(Dot(Log(Softmax(X)),Y)))",
                "Div(Dot(Y,Log(Softmax(X))),Neg(2))",
            ],
        ),
        (
            ONE,
            [
                "Softplus(Neg(Mul(X,Sub(PY,NY))))",
                "Neg(Log(Sig(Mul(X,Sub(PY,NY)))))",
                "Log(Add(1,Exp(Mul(X,Sub(NY,PY)))))",
            ],
        ),
        (REG, ["Sub(1,Div(I,U))", "Neg(Div(I,U))", "Div(Sub(U,I),U)", "Mul(3,Sub(2,Div(I,U)))"]),
    ],
)
def test_losses_with_one_gradient_up_to_a_factor_have_one_fingerprint(space, same):
    assert len(set(fingerprint([parse(text, space) for text in same], space))) == 1


@spaces
def test_losses_that_differ_have_different_fingerprints(space):
    expressions = [loss.expression for loss in space.losses.values()]
    opposite = [parse(f"Neg({expression})", space) for expression in expressions]
    prints = fingerprint(expressions + opposite, space)
    assert len(set(prints)) == len(prints)
    assert fingerprint(expressions[1:2], space) == prints[1:2]  # company changes nothing


def test_of_many_losses_that_differ_a_little_none_is_taken_for_another():
    """More than their number in cells of one projection, so that by one some would be."""
    texts = [
        f"Add({BCE_TO.format(t='PY')},Mul(Sub(PY,Sig(X)),Add(Mul({a / 50:g},X),{b / 50:g})))"
        for a in range(1, 33)
        for b in range(1, 33)
    ]
    prints = fingerprint([parse(text, ONE_PLUS) for text in texts], ONE_PLUS)
    assert len(set(prints)) == len(texts)


def test_losses_without_a_gradient_are_not_taken_for_each_other():
    assert (
        len(
            set(
                fingerprint(
                    [parse(text, REG) for text in ("1", "2", "Log(Neg(U))", "Sub(U,U)")], REG
                )
            )
        )
        == 4
    )


# --- probes ---


def probed(space, **changes):
    return dataclasses.replace(space, probes={**space.probes, **changes})


@pytest.mark.parametrize(
    "space, changes, message",
    [
        (TWO, {"logits": [8, -8]}, r"probes.logits: expected \[lowest, highest\]"),
        (TWO, {"stepps": 3}, "probes.stepps: unknown key; did you mean 'steps'"),
        (TWO, {"steps": 2.5}, "probes.steps: expected an integer from 3 to 1000, found '2.5'"),
        (TWO, {"classes": []}, "probes.classes: expected a list of one or more integers"),
        (TWO, {"ious": [2]}, "probes.ious: expected a list of one or more numbers from 0 to 1"),
        (ONE, {"tolerances": {"monotonicity": 1}}, "probes.tolerances.flatness: missing"),
        (REG, {"areas": "all"}, "probes.areas: expected a list of one or more numbers"),
        (
            REG,
            {"tolerances": {**REG.probes["tolerances"], "balance": -1}},
            "probes.tolerances.balance: expected a number from 0 to 1",
        ),
    ],
)
def test_wrong_probes_are_refused_in_one_line(space, changes, message):
    with pytest.raises(SpaceError, match=f"^{space.name}: {message}") as error:
        Screener(probed(space, **changes))
    assert "\n" not in str(error.value)


def test_probes_can_be_tightened_and_widened():
    wobbly = parse("Add(Neg(Dot(Y,Log(Softmax(X)))),Div(Dot(Y,Sin(X)),Mul(3,Mul(3,3))))", TWO)
    assert verify(wobbly, TWO).accepted
    strict = probed(TWO, tolerances={**TWO.probes["tolerances"], "rebound": 0.001})
    assert verify(wobbly, strict).failed == "monotonicity"
    loose = dict.fromkeys(("monotonicity", "rebound", "convergence", "fading"), 1)
    stormy = parse("Add(Neg(Dot(Y,Log(Softmax(X)))),Mul(3,Dot(Y,Sin(X))))", TWO)
    assert verify(stormy, TWO).failed == "monotonicity"
    assert verify(stormy, probed(TWO, tolerances={**TWO.probes["tolerances"], **loose})).accepted
    slow = parse("Neg(Dot(Sub(Mul(2,Y),1),Tanh(X)))", TWO)  # has not settled where the range ends
    assert verify(slow, TWO).accepted
    assert verify(slow, probed(TWO, logits=[-1, 1], wrong=[0.5, 2])).failed == "convergence"


def test_probes_cover_what_they_promise():
    blocks = Screener(REG).probes.blocks
    union, overlap, enclosing = (
        np.concatenate([block.values[name].ravel() for block in blocks]) for name in "UIE"
    )
    iou = overlap / union
    apart, close = iou < 1.1e-6, iou > 0.9999  # boxes apart have a millionth, as in training
    assert apart.any() and close.any() and (~apart & (iou < 0.1)).any()
    assert (enclosing >= union * (1 - 1e-6)).all() and (union >= overlap).all()
    assert union.min() <= 5 and union.max() >= 1e6
    for space in (TWO, ONE):
        for block in Screener(space).probes.blocks:
            assert block.values["X"].min() <= -8 and block.values["X"].max() >= 8
    assert {block.columns for block in Screener(TWO).probes.blocks} == {2, 5}


# --- the command line ---


def run(*args):
    return CliRunner().invoke(cli, args, catch_exceptions=False)


def test_verify_says_what_fell_and_where(tmp_path):
    good = run("verify", "CSE-Autoloss-A", "--space", "reg", "--plot", str(tmp_path / "a.svg"))
    assert (
        good.exit_code == 0
        and good.stdout.startswith("accepted")
        and "finite-values     proved for boxes" in good.stdout
        and "convergence       sampled" in good.stdout
        and (tmp_path / "a.svg").stat().st_size > 1000
    )
    bad = run("verify", "Sin(Div(I,U))", "--space", "reg")
    assert (
        bad.exit_code == 1
        and bad.output.startswith("rejected: monotonicity")
        and "I = " in bad.output
    )
    shown = json.loads(run("verify", "Sqrt(Neg(U))", "--space", "reg", "--json").stdout)
    assert shown["failed"] == "finite-values" and shown["counterexample"]["values"][0] == "nan"


def test_a_picture_that_cannot_be_drawn_is_no_verdict(tmp_path):
    """Exit status 1 says that a loss is rejected."""
    with pytest.raises(UserError, match=r"--plot .*loss\.xyz: Format 'xyz' is not supported"):
        run("verify", "GIoU", "--space", "reg", "--plot", str(tmp_path / "loss.xyz"))
    assert run("verify", "GIoU", "--space", "reg", "--plot", str(tmp_path / "new" / "a.svg"))
    assert (tmp_path / "new" / "a.svg").is_file()


def test_screen_reports_shares_and_writes_survivors(tmp_path):
    path = tmp_path / "survivors.txt"
    result = run(
        "screen", "--space", "reg", "--n", "20000", "--seed", "1", "--json", "--output", str(path)
    )
    report = json.loads(result.stdout)
    lines = path.read_text().splitlines()
    assert (
        report["generated"] == 20000
        and report["survivors"] == len(lines) > 0
        and report["candidates_per_second"] > 0
    )
    assert list(report["rejected"]) == list(PROPERTIES)
    assert sum(report["rejected"].values()) + len(lines) == report["unique"]
    screener = Screener(REG, batch_size=1)
    assert all(screener.verify(parse(line, REG)).accepted for line in lines)
    assert (
        "no folder"
        in run("screen", "--space", "reg", "--output", str(tmp_path / "none" / "x")).output
    )


def test_the_result_does_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4_000)  # so that each of two workers has several
    alone, apart = (sampling.sample(REG, 18_000, 3, workers=workers) for workers in (None, 2))
    assert dataclasses.replace(alone, seconds=0) == dataclasses.replace(apart, seconds=0)
    assert alone.generated == 18_000 > alone.unique > len(alone.survivors) > 0
