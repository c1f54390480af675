"""DDP, distributed AdamW and EMA on several layouts against one process and against plain formulas."""

import numpy as np
import pytest
import torch

from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.training.ema import PowerEMA, power_decay, power_exponent
from rcm_megatron.training.optimizer import (
    FusedAdam,
    gather_main_grads,
    global_gradient_norm,
    optimizer_step,
    set_learning_rate,
    warmup_learning_rate,
)
from tests.distributed.harness import run_ranks
from tests.distributed.toy_model import OPTIMIZER, SHAPES, ToyRun, gather_full
from tests.helpers import assert_close

LAYOUTS = {"tp2": (2, 1, 2), "dp2": (1, 1, 2), "cp2": (1, 2, 2), "tp2_dp2": (2, 1, 4), "cp2_dp2": (1, 2, 4)}


def gradients_and_weights(tp, cp, dtype, steps):
    run = ToyRun(tp=tp, cp=cp, dtype=dtype)
    run.backward(0)
    by_parameter = gather_main_grads(run.chunks)
    gradients = {name: by_parameter[parameter] for name, parameter in run.model.named_parameters()}
    gradients = gather_full(gradients, run.groups)
    norm = global_gradient_norm(run.optimizer, run.groups)
    run.train(range(steps))
    return gradients, norm, run.weights()


@pytest.fixture(scope="module")
def one_process():
    return {dtype: run_ranks(gradients_and_weights, 1, 1, 1, dtype, 3)[0] for dtype in (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16_and_fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_gradients_norm_and_weights_equal_one_process(one_process, layout, dtype):
    tp, cp, ranks = LAYOUTS[layout]
    reference, reference_norm, reference_weights = one_process[dtype]
    rel = 2e-6 if dtype == torch.float32 else 2e-2
    for rank, (gradients, norm, weights) in enumerate(run_ranks(gradients_and_weights, ranks, tp, cp, dtype, 3)):
        assert gradients.keys() == reference.keys() == SHAPES.keys()
        for name, gradient in reference.items():
            assert_close(f"rank {rank} gradient {name}", gradient, gradients[name], rel=rel)
            assert_close(f"rank {rank} weight {name}", reference_weights[name], weights[name], rel=10 * rel)
        assert norm == pytest.approx(reference_norm, rel=rel)
        total = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
        assert norm == pytest.approx(total, rel=1e-6), "every element once"


def test_adam_matches_torch_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 37)) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    adam, reference = FusedAdam([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(37)
        adam.step()
        reference.step()
        assert_close("parameter", theirs, ours, rel=1e-6)
    assert adam.param_groups[0]["step"] == 4


def decay_without_gradient():
    run = ToyRun(tp=2)
    before = run.weights()
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    assert optimizer_step(run.optimizer, run.groups).updated
    return before, run.weights()


def test_weight_decay_acts_on_every_parameter():
    before, after = run_ranks(decay_without_gradient, 2)[0]
    for name, weight in before.items():
        assert_close(name, weight * (1 - OPTIMIZER.lr * OPTIMIZER.weight_decay), after[name], rel=1e-7)


def poisoned_step():
    run = ToyRun(tp=2, dtype=torch.bfloat16)
    run.train([0])
    before = run.weights()
    run.backward(1, poison=True)
    result = optimizer_step(run.optimizer, run.groups)
    unchanged = all(torch.equal(before[name], weight) for name, weight in run.weights().items())
    steps = {group["step"] for group in run.optimizer.param_groups}
    run.train([1])
    return result.updated, unchanged, steps, all(bool(w.isfinite().all()) for w in run.weights().values())


def test_non_finite_gradients_on_one_rank_skip_the_update_on_all():
    for result in run_ranks(poisoned_step, 4):
        assert result == (False, True, {1}, True)


def clipped_norms():
    run = ToyRun(tp=2)
    run.backward(0)
    norm = global_gradient_norm(run.optimizer, run.groups)
    optimizer_step(run.optimizer, run.groups, clip_grad=norm / 4)
    clipped = global_gradient_norm(run.optimizer, run.groups)
    set_learning_rate(run.optimizer, 0.125)
    return norm, clipped, [group["lr"] for group in run.optimizer.param_groups]


def test_clipping_by_the_global_norm_and_learning_rate():
    for norm, clipped, rates in run_ranks(clipped_norms, 2):
        assert clipped == pytest.approx(norm / 4, rel=1e-6)
        assert set(rates) == {0.125}


def test_warmup_is_linear_and_then_constant():
    rates = [warmup_learning_rate(update, peak=2.0, warmup_updates=4) for update in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert warmup_learning_rate(0, peak=2.0, warmup_updates=0) == 2.0


# ---- EMA


def test_power_exponent_gives_the_width_and_refuses_an_impossible_one():
    for width in (0.05, 0.1, 0.25):
        gamma = power_exponent(width)
        assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(width, rel=1e-9)
    assert power_exponent(0.1) == pytest.approx(6.94, abs=5e-3)
    with pytest.raises(ValueError, match=r"relative_width=0\.3; need 0 < width < 0\.288"):
        power_exponent(0.3)


def ema_of_a_run(steps):
    run = ToyRun(tp=2, dtype=torch.bfloat16)
    ema = PowerEMA(run.optimizer, 0.1)
    shards = owned_shards(run.optimizer)
    expected = [shard.main.detach().double().numpy().copy() for shard in shards]
    for step in range(1, steps + 1):
        run.train([step])
        ema.update(step)
        beta = (1 - 1 / (step + 1)) ** (ema.gamma + 1)
        expected = [
            beta * e + (1 - beta) * s.main.detach().double().numpy() for e, s in zip(expected, shards, strict=True)
        ]
    own, mains = run.weights(), [shard.main.detach().clone() for shard in shards]
    averages = [average.clone() for average in ema.shards]
    try:
        with ema.swapped_in():
            inside = run.weights()
            raise KeyError("leaves by an error")
    except KeyError:
        pass
    restored = (
        all(torch.equal(own[name], weight) for name, weight in run.weights().items())
        and all(torch.equal(main, shard.main) for main, shard in zip(mains, shards, strict=True))
        and all(map(torch.equal, averages, ema.shards))
    )
    error = max(float(np.abs(e - a.numpy()).max()) for e, a in zip(expected, averages, strict=True))
    moved = max(float(np.abs(e - m.numpy()).max()) for e, m in zip(expected, mains, strict=True))
    run.train([steps + 1])
    return error, moved, restored, own, inside, run.weights()


def test_ema_follows_the_formula_and_is_swapped_in_and_out_bit_for_bit():
    results = run_ranks(ema_of_a_run, 4, 4)
    for error, moved, restored, own, inside, _ in results:
        assert error < 1e-6 < moved
        assert restored
        for name, weight in own.items():
            assert not torch.equal(weight, inside[name]), f"{name}: the average was not swapped in"
            assert torch.equal(inside[name], results[0][4][name]), f"{name}: ranks differ"


def test_decay_of_the_first_updates():
    assert power_decay(1, gamma=1.0) == pytest.approx(0.25)
    assert power_decay(9, gamma=0.0) == pytest.approx(0.9)
