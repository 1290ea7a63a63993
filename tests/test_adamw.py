"""AdamW on masters of four bytes: against torch's own on fp32 masters, on a CPU bit for bit.

kernels/triton_adamw.py runs in Triton's interpreter, which must be chosen before triton is imported: in a second
pytest, with TRITON_INTERPRET=1.
"""

import pytest
import torch

from kernels import native
from tests.test_kernels import in_interpreter, in_interpreter_pass, outside
from training import adamw
from training.adamw import PIECE, AdamW, joined, master_of, split

compiled = pytest.param(True, marks=pytest.mark.skipif(not native.usable(torch.empty(0)),
                                                       reason="needs a C++ compiler"), id="C++")


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[compiled, pytest.param(False, id="torch")])
def code(request, monkeypatch):
    """Both ways to split and join."""
    if not request.param:
        monkeypatch.setattr(native, "usable", lambda x: False)


def split_up(master):
    weight, remainder = master.bfloat16(), torch.empty_like(master, dtype=torch.int16)
    split(master, weight, remainder)
    return weight, remainder


def test_a_weight_and_its_remainder_are_the_master_to_the_last_bit(code):
    bits = torch.randint(-2 ** 31, 2 ** 31, (100_000,), generator=torch.Generator().manual_seed(0))
    odd = [0, 1, 0x8000, 0x7fff, 0x8001, 0x18000, 0x17fff, 0x3f808000, 0x3f818000, 0x007fffff]
    bits = torch.cat([bits, torch.tensor(odd), torch.tensor(odd) - 2 ** 31]).int()
    master = bits.view(torch.float32)
    master = master[master.isfinite()].clone()
    weight, remainder = split_up(master)
    assert torch.equal(joined(weight, remainder).view(torch.int32), master.view(torch.int32))
    tie = (master.view(torch.int32) & 0xffff) == 0x8000
    assert tie.sum() >= 8 and torch.equal(weight[~tie], master[~tie].bfloat16())
    away = ((master.view(torch.int32)[tie] >> 16) + 1).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(weight[tie].view(torch.int16), away.view(torch.int16))


SHAPES = [(3, PIECE // 2), (50, 64), (7, 9), (31,)]     # the first in three pieces


def test_200_steps_in_bf16_equal_those_on_fp32_masters_bit_for_bit(code):
    masters = [normal(*shape, seed=i).bfloat16().float() for i, shape in enumerate(SHAPES)]
    weights = [m.bfloat16() for m in masters]
    ours = AdamW(weights)
    torchs = torch.optim.AdamW(masters, 1e-5, (0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(200):
        gradients = [w.float() * normal(*w.shape, seed=step) for w in weights]      # of the rounded
        for m, g in zip(masters, gradients, strict=True):
            m.grad = 0.5 * g
        torchs.step()
        ours.step([g.clone() for g in gradients], 1e-5, 0.5)
        assert all(torch.equal(split_up(m)[0], w) for m, w in zip(masters, weights, strict=True))
    for m, w, state in zip(masters, weights, ours.state, strict=True):
        assert torch.equal(m, master_of(w, state))
        assert all(torch.equal(torchs.state[m][key], state[key]) for key in ("exp_avg", "exp_avg_sq"))
    assert not torch.equal(masters[0], masters[0].bfloat16().float())


@pytest.mark.parametrize("dtype, bytes_beside", [
    (torch.float32, 8), (torch.bfloat16, 10), (torch.float16, 12)], ids=str)
def test_a_step_follows_torchs_and_takes_no_more_than_it_says(dtype, bytes_beside):
    weight = normal(50, 64).to(dtype)
    ours, master = AdamW([weight]), weight.float().clone()
    torchs = torch.optim.AdamW([master], 1e-3, (0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(5):
        master.grad = normal(50, 64, seed=step)
        torchs.step()
        ours.step([normal(50, 64, seed=step)], 1e-3, 1.0)
    assert torch.equal(master_of(weight, ours.state[0]), master)
    assert torch.allclose(weight.float(), master, rtol=0.004)
    assert sum(x.nbytes for x in ours.state[0].values()) == bytes_beside * weight.numel()


def test_a_weight_without_a_gradient_stays_and_its_moments_too():
    weights = [normal(4, 8), normal(4, 8)]
    ours, before = AdamW(weights), weights[0].clone()
    ours.step([None, normal(4, 8)], 1e-2, 1.0)
    assert torch.equal(weights[0], before) and not ours.state[0]["exp_avg"].any()
    assert ours.state[1]["exp_avg"].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_eight_bits_take_two_bytes_and_a_step_nearly_the_same(dtype):
    pytest.importorskip("torchao", reason="needs torchao (pip install torchao)")
    weights = [normal(600, 576).to(dtype), normal(576).to(dtype)]
    exact = [w.clone() for w in weights]
    ours, plain = AdamW(weights, eight_bit=True), AdamW(exact)
    start = [master_of(*pair).clone() for pair in zip(weights, ours.state, strict=True)]
    for step in range(10):
        gradients = [normal(*w.shape, seed=step) for w in weights]
        plain.step([g.clone() for g in gradients], 1e-4, 1.0)
        ours.step(gradients, 1e-4, 1.0)
    moved, planned = ([master_of(*pair) - s for *pair, s in zip(w, o.state, start, strict=True)]
                      for w, o in ((weights, ours), (exact, plain)))
    assert torch.equal(moved[1], planned[1])            # a vector's moments stay in fp32
    assert 0 < (moved[0] - planned[0]).norm() < 0.03 * planned[0].norm()
    moments = sum(x.nbytes for name, x in ours.state[0].items() if name.startswith("exp"))
    assert moments < 2.2 * weights[0].numel()


# -- Triton ------------------------------------------------------------------------------------------------------------


@in_interpreter
def test_triton_keeps_every_bit_of_a_master(monkeypatch):
    """Those between two bf16 numbers too, in a step of length 0."""
    monkeypatch.setattr(adamw, "in_triton", lambda weight, state: True)
    master = torch.tensor([0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0x3f800000]).int().view(torch.float32)
    optimizer = AdamW([master.bfloat16()])
    split(master, optimizer.weights[0], optimizer.state[0]["remainder"])
    optimizer.step([torch.ones(5)], 0.0, 1.0)
    assert torch.equal(master_of(optimizer.weights[0], optimizer.state[0]), master)


def few_steps(weights) -> AdamW:
    """Of learning rates that are small beside the weights' rounding."""
    optimizer = AdamW(weights)
    for step in range(12):
        optimizer.step([normal(*w.shape, seed=step).to(w.device) for w in weights], 1e-5 * (step + 1), 0.25)
    return optimizer


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_the_same_steps(dtype, monkeypatch):
    start = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate([(50, 64), (7, 9), (31,), (3, 1025), (0, 4)])]
    expected, ours, wide = [w.clone() for w in start], [w.clone() for w in start], [w.clone().float() for w in start]
    plain = few_steps(expected)
    monkeypatch.setattr(adamw, "in_triton", lambda weight, state: True)
    optimizer, widened = few_steps(ours), few_steps(wide)
    for i in range(4):
        master, theirs = master_of(ours[i], optimizer.state[i]), master_of(expected[i], plain.state[i])
        assert (master - theirs).norm() < 1e-3 * (theirs - start[i].float()).norm()
        assert torch.equal(master, wide[i])             # no bit is lost between a weight and its master
        assert torch.equal(ours[i], split_up(master)[0] if dtype == torch.bfloat16 else master.to(dtype))
        for key in ("exp_avg", "exp_avg_sq"):
            moment, same = optimizer.state[i][key], plain.state[i][key]
            assert (moment - same).norm() < 1e-6 * same.norm()
            assert torch.equal(moment, widened.state[i][key])


@pytest.mark.slow
@outside
def test_the_triton_kernel_passes_its_tests_in_the_interpreter():
    in_interpreter_pass(__file__)
