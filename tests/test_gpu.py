"""On a GPU losses and screening give what they give on the CPU. Skipped, in words, without one."""

import random

import numpy as np
import pytest
import torch
from test_losses import KNOWN, batch

from cse_autoloss import load_space
from cse_autoloss.losses import build_loss
from cse_autoloss.screening import Screener
from cse_autoloss.screening.sampling import grow, sample
from cse_autoloss.screening.screener import ACCEPTED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
SPACES = ["two_stage_cls", "one_stage_cls", "reg"]


def value_and_gradient(loss, device, dtype=torch.float32, **arguments):
    arguments = {name: value.to(device) for name, value in arguments.items()}
    pred = arguments.pop("pred").to(dtype, copy=True).requires_grad_()  # not the caller's
    value = loss(pred, reduction_override="sum", **arguments)
    value.backward()
    return value.item(), pred.grad.float().cpu()


def agree(loss, space, **arguments):
    here, there = (value_and_gradient(loss, device, **arguments) for device in ("cpu", "cuda"))
    assert there[0] == pytest.approx(here[0], rel=1e-5, abs=1e-5)
    torch.testing.assert_close(there[1], here[1], rtol=1e-4, atol=1e-5 * here[1].norm().item())


@pytest.mark.parametrize(("space", "name"), KNOWN)
@pytest.mark.parametrize("count", [0, 40, 4000])
def test_a_known_loss_is_the_same(space, name, count):
    agree(build_loss(name, space), space, **batch(space, count=count))


@pytest.mark.parametrize("space", SPACES)
def test_what_screening_lets_through_is_the_same(space):
    survivors = sample(load_space(space), 100_000, 0).survivors
    for text in random.Random(0).sample(survivors, min(40, len(survivors))):
        agree(build_loss(text, space), space, **batch(space, count=400, spread=1.0))


@pytest.mark.parametrize(("space", "name"), KNOWN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_give_the_loss_of_these_numbers(space, name, dtype):
    loss, arguments = build_loss(name, space), batch(space)
    arguments["pred"] = arguments["pred"].to(dtype).float()
    half = value_and_gradient(loss, "cuda", dtype, **arguments)
    single = value_and_gradient(loss, "cuda", **arguments)
    assert half[0] == pytest.approx(single[0], rel=1e-4)
    torch.testing.assert_close(half[1], single[1], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("space", SPACES)
def test_screening_gives_the_verdicts_of_the_cpu(space):
    space = load_space(space)
    population = grow(np.random.default_rng(4), 20_000, space)
    cpu, gpu = (
        Screener(space, device=device).screen(population).codes for device in (None, "cuda")
    )
    assert np.mean(cpu == gpu) > 0.99  # which property falls may hang on a last bit
    assert np.mean((cpu == ACCEPTED) != (gpu == ACCEPTED)) < 1e-3
