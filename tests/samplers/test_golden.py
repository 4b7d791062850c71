"""ReMDM, KLASS, GIDD and P2 against numbers of their reference code, with its uniforms."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.samplers.gidd import SelfCorrection
from lightning_modules.samplers.kernel import Absorbing, Uniform
from lightning_modules.samplers.klass import KLASS
from lightning_modules.samplers.loop import Rows, Sampler, run
from lightning_modules.samplers.planning import PathPlanning
from lightning_modules.samplers.remdm import ReMDM

pytestmark = pytest.mark.golden


class Linear:
    """The network of the cases: logits(x)[n] = bias[n] + sum_j weight[j, x_j, n]."""

    def __init__(
        self, io: dict[str, Tensor], shift: Tensor | None = None, prefix: str = ""
    ) -> None:
        self.bias, self.weight = io[f"{prefix}bias"].double(), io[f"{prefix}weight"].double()
        self.shift = shift
        self.codes = self.bias.shape[1]

    def logits(self, pictures: Tensor, x: Tensor) -> Tensor:
        out = self.bias.expand(len(x), -1, -1).clone()
        if self.shift is not None:
            out += self.shift[pictures][:, None]
        for j in range(x.shape[1]):
            out += self.weight[j][x[:, j]]
        return out

    def __call__(
        self, pictures: Tensor, x: Tensor, time: Tensor, done: Tensor, keep: Tensor
    ) -> Rows:
        rows = self.logits(pictures, x)[keep]
        return Rows(rows, lambda r: r, torch.ones(len(rows)))


def scripted(uniforms: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Uniforms [T, streams, B, N], one step after the other."""
    steps = iter(uniforms.double())
    return lambda pictures, streams: next(steps)[:, pictures]


def states_of(sampler: Sampler, network: Linear, start: Tensor, uniforms: Tensor) -> Any:
    states = [start]
    result = run(
        sampler,
        network,
        start,
        start == network.codes,
        scripted(uniforms),
        on_step=lambda i, x, out: states.append(out),
    )
    return torch.stack(states), result


@pytest.mark.parametrize("rule", ["cap", "rescale", "conf", "loop"])
def test_remdm(golden, rule):
    case = golden(f"samplers/remdm_{rule}")
    c = case.config
    more = {"on": c["t_on"], "off": c["t_off"], "level": c["alpha_on"]} if rule == "loop" else {}
    network = Linear(case.io)
    sampler = ReMDM(Absorbing(network.codes), c["steps"], c["rule"], c["eta"], **more)
    states, _ = states_of(sampler, network, case.io["states"][0], case.io["uniforms"])
    assert torch.equal(states, case.io["states"])
    again = (states[:-1] != network.codes) & (states[1:] == network.codes)
    assert again.flatten(1).sum(1).tolist() == case.case["masked_again"] and bool(again.any())


def test_klass(golden):
    case = golden("samplers/klass")
    c, io = case.config, case.io
    pictures = io["states"].shape[1]
    codes = io["bias"].shape[1]
    shift = 0.3 * torch.arange(pictures)[:, None] * torch.arange(codes)
    network = Linear(io, shift.double())
    sampler = KLASS(Absorbing(codes), c["steps"], c["kl"], c["sure"], c["history"])
    states, result = states_of(sampler, network, io["states"][0], io["uniforms"][:, None])
    assert torch.equal(states, io["states"][: len(states)])
    assert torch.equal(states[-1], io["states"][-1])
    assert result.calls.tolist() == case.case["calls"] and max(case.case["calls"]) < c["steps"]


def test_gidd(golden):
    case = golden("samplers/gidd")
    io, network = case.io, Linear(case.io)
    sampler = SelfCorrection(Uniform(network.codes), 0, **case.config)
    everywhere = torch.ones_like(io["start"], dtype=torch.bool)
    u = io["uniforms"][:, None]
    found = run(sampler, network, io["start"], everywhere, scripted(u))
    assert torch.equal(found.tokens, io["end"]) and not torch.equal(io["start"], io["end"])
    assert found.calls.tolist() == case.case["calls"]


@pytest.mark.parametrize("name", ["p2_self", "p2_eta", "p2_critic"])
def test_path_planning(golden, name):
    case = golden(f"samplers/{name}")
    c, io, network = case.config, case.io, Linear(case.io)
    critic = None
    if c["critic"]:
        judge = Linear(io, prefix="critic_")

        def critic(pictures: Tensor, x: Tensor) -> Tensor:
            return judge.logits(pictures, x).gather(2, x[..., None]).squeeze(2)

    sampler = PathPlanning(Absorbing(network.codes), c["steps"], c["eta"], critic)
    states, _ = states_of(sampler, network, io["states"][0], io["uniforms"][:, None])
    assert torch.equal(states, io["states"])
    again = (states[:-1] != network.codes) & (states[1:] == network.codes)
    assert again.flatten(1).sum(1).tolist() == case.case["masked_again"] and bool(again.any())
