"""Our scheduler against diffusers' own, from the dev extras, and in one of its pipelines."""

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_modules.common.categorical import draw
from lightning_modules.samplers.kernel import Absorbing, Uniform
from lightning_modules.samplers.loop import gumbel
from lightning_modules.samplers.scheduler import DiscreteScheduler
from lightning_modules.samplers.settings import SamplerConfig

K, MASK, SEED = 24, 31, 6


def cosine(time: Tensor) -> Tensor:
    """Masked share of aMUSEd at a time."""
    return torch.sin(time * torch.pi / 2)


def ours(masks: Any = cosine) -> DiscreteScheduler:
    return DiscreteScheduler(Absorbing(K, masks), SamplerConfig("confidence"), mask_token_id=MASK)


@pytest.fixture
def amused(monkeypatch: pytest.MonkeyPatch) -> Any:
    """AmusedScheduler, whose draws are ours: two uniforms per place, one for the choice."""
    from diffusers.schedulers import scheduling_amused as module

    chances: list[Tensor] = []

    def multinomial(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(2, *chances[0].shape, generator=generator)
        chances[1:] = [u[1]]
        return draw(p.log(), u[0].flatten())[:, None]

    def noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return gumbel(chances[1])

    def shaped(shape: tuple[int, int], **config: Any) -> Any:
        chances[:] = [torch.empty(shape)]
        return module.AmusedScheduler(mask_token_id=MASK, **config)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(module, "gumbel_noise", noise)
    return shaped


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_amused(amused: Any, schedule: str) -> None:
    torch.manual_seed(0)
    shape, steps = (3, 4, 6), 7
    theirs = amused((3, 24), masking_schedule=schedule)
    mine = ours(cosine if schedule == "cosine" else lambda time: time)
    weight = torch.randn(MASK + 1, K) * 2

    def network(x: Tensor) -> Tensor:
        return (weight[x] + weight[x.roll(1, 2)] + torch.arange(24).view(4, 6, 1).sin()).movedim(
            -1, 1
        )

    ends = []
    for scheduler in (theirs, mine):
        generator = torch.Generator().manual_seed(SEED)
        x = torch.full(shape, MASK)
        scheduler.set_timesteps(steps, (2, 0), None)
        states = []
        for t in scheduler.timesteps:
            x = scheduler.step(network(x), t, x, generator=generator).prev_sample
            states.append(x)
        ends.append(torch.stack(states))
    assert torch.equal(*ends) and int(ends[0][-1].max()) < K
    assert int((ends[0][0] == MASK).sum()) > 0


def test_it_serves_in_the_amused_pipeline(amused: Any) -> None:
    from diffusers import AmusedPipeline, UVit2DModel

    torch.manual_seed(1)
    network = UVit2DModel(
        hidden_size=8,
        cond_embed_dim=4,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=MASK + 1,
        codebook_size=K,
        num_hidden_layers=1,
        num_attention_heads=1,
        in_channels=8,
        block_out_channels=8,
        block_num_heads=1,
        intermediate_size=16,
        sample_size=4,
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    text = {
        "prompt_embeds": torch.randn(2, 4),
        "encoder_hidden_states": torch.randn(2, 3, 8),
        "negative_prompt_embeds": torch.randn(2, 4),
        "negative_encoder_hidden_states": torch.randn(2, 3, 8),
    }
    found = []
    for scheduler in (amused((2, 16)), ours()):
        pipeline = AmusedPipeline(None, None, None, network, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(SEED)
        call = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "latent"}
        size = {"height": 32, "width": 32}
        found.append(pipeline(**text, **call, **size, generator=generator, return_dict=False)[0])
    assert torch.equal(*found) and found[0].unique().numel() > 3


def test_the_uniform_posterior_has_the_law_of_theirs() -> None:
    from diffusers.schedulers.scheduling_discrete_ddim import DiscreteDDIMScheduler

    steps, n, codes = 4, 60_000, 5
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(codes, generator=generator).expand(1, n, codes) * 1.5
    sample = (torch.arange(n) % 2)[None]  # of two present tokens
    theirs = DiscreteDDIMScheduler(steps)
    mine = DiscreteScheduler(Uniform(codes), SamplerConfig("posterior"))
    theirs.set_timesteps(steps)
    for i in range(steps):
        mine.set_timesteps(steps)
        time = mine.timesteps[i]
        pair = (
            theirs.step(logits, theirs.timesteps[i], sample, temperature=1.0, generator=generator),
            mine.step(logits, time, sample, generator=generator),
        )
        for present in (0, 1):
            counts = [
                torch.bincount(out.prev_sample[sample == present], minlength=codes).numpy()
                for out in pair
            ]
            assert stats.chi2_contingency(counts).pvalue > 1e-4, (i, present)
