"""Quantizers against slow versions, and what running statistics do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.vqgan import quantizer as q
from lightning_modules.vqgan.config import ModelConfig

K, C = 12, 3


def make(kind: str, seed: int = 0, **settings: Any) -> q.Quantizer:
    torch.manual_seed(seed)
    made = q.QUANTIZERS[kind](
        ModelConfig(quantizer=kind, num_codes=K, embed_dim=C, **settings)  # type: ignore[arg-type]
    )
    codes = made.embed if isinstance(made, q.GumbelQuantizer) else made.embedding
    codes.weight.data.normal_()
    if isinstance(made, q.EMAQuantizer):
        made.embed_avg.copy_(codes.weight)
    return made


def latents(seed: int, b: int = 2, h: int = 4, w: int = 5) -> Tensor:
    return torch.randn(b, C, h, w, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_smallest_distance_in_any_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, codes = torch.randn(50, C, generator=generator), torch.randn(K, C, generator=generator)
    slow = torch.stack([(r - codes).square().sum(1).argmin() for r in rows])
    for limit in (1, 5 * K, 7 * K + 1, 10**6):
        monkeypatch.setattr(q, "MAX_DISTANCES", limit)
        assert torch.equal(q.nearest(rows, codes), slow)


def test_ema_equals_a_loop_over_codes() -> None:
    decay, eps = 0.9, 1e-3
    fast = make("ema", decay=decay, eps=eps)
    size, sums = [1.0] * K, [v.clone() for v in fast.codebook()]
    for step in range(4):
        z = latents(step)
        out = fast(z)
        rows = [z[b, :, i, j] for b in range(2) for i in range(4) for j in range(5)]
        tokens = out.tokens.flatten().tolist()
        for k in range(K):
            mine = [r for r, t in zip(rows, tokens, strict=True) if t == k]
            size[k] = decay * size[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine, torch.zeros(C))
        total = sum(size)
        expected = [
            s / ((n + eps) / (total + K * eps) * total) for s, n in zip(sums, size, strict=True)
        ]
        before = fast.codebook().clone()
        fast.update(z, out.tokens)
        torch.testing.assert_close(fast.codebook(), torch.stack(expected))
        assert not torch.equal(before, fast.codebook())


def test_an_unused_ema_code_stays_where_it_is() -> None:
    ema = make("ema")
    before = ema.codebook().clone()
    z = ema.codebook()[3].view(1, C, 1, 1).expand(2, C, 4, 4)
    ema.update(z, ema.assign(z))
    torch.testing.assert_close(ema.codebook()[4:], before[4:], rtol=1e-3, atol=1e-4)


def test_only_update_changes_state() -> None:
    for kind in ("nearest", "ema", "l2"):
        made = make(kind, restart_after=1).train()
        before = {k: v.clone() for k, v in made.state_dict().items()}
        made(latents(0))
        assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


@pytest.mark.parametrize("kind", ["nearest", "ema", "l2"])
def test_dead_codes_become_latents_of_the_batch(kind: str) -> None:
    made = make(kind, restart_after=2)
    near = made.codebook()[5].detach().clone()
    z = (near.view(1, C, 1, 1) + 1e-3 * latents(1)).contiguous()
    tokens = made.assign(z)
    assert set(tokens.flatten().tolist()) == {5}
    start = made.codebook().detach().clone()

    made.update(z, tokens)  # unused once: nothing dies yet
    torch.testing.assert_close(made.codebook()[:5], start[:5], rtol=1e-3, atol=1e-3)
    made.update(z, tokens, generator=torch.Generator().manual_seed(3))
    rows = z.permute(0, 2, 3, 1).reshape(-1, C)
    if kind == "l2":
        rows = torch.nn.functional.normalize(rows, dim=1)
    for k in set(range(K)) - {5}:
        gap = (made.codebook()[k] - rows).abs().amax(1).min()
        assert gap < 1e-6, f"code {k} is no latent of the batch"
    assert made.idle.tolist() == [0] * K
    if kind == "ema":
        made.update(z, tokens)
        # one update later a restarted code must still be where it was put
        assert (made.codebook()[0] - rows).abs().amax(1).min() < 1e-2

    again = make(kind, restart_after=2)
    for _ in range(2):
        again.update(z, tokens, generator=torch.Generator().manual_seed(3))
    other = make(kind, restart_after=2)
    for _ in range(2):
        other.update(z, tokens, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(again.codebook(), other.codebook())


def test_codes_in_use_are_not_restarted() -> None:
    made = make("nearest", restart_after=1)
    before = made.codebook().detach().clone()
    z = latents(2, 1, 1, 4)
    tokens = made.assign(z)
    used = set(tokens.flatten().tolist())
    assert 0 < len(used) < K
    made.update(z, tokens)
    changed = {k for k in range(K) if not torch.equal(before[k], made.codebook()[k])}
    assert changed == set(range(K)) - used


def test_gumbel_draws_only_where_it_is_asked_to() -> None:
    z = latents(0)
    argmax = make("gumbel").eval()
    assert torch.equal(argmax.assign(z), argmax.proj(z).argmax(1))
    assert torch.equal(argmax(z).tokens, argmax.assign(z))

    draws = make("gumbel", sample_tokens=True).eval()
    one, two = (draws.assign(z, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(one, draws.assign(z, torch.Generator().manual_seed(1)))
    assert not torch.equal(one, two)


def test_gumbel_draws_follow_the_softmax() -> None:
    draws = make("gumbel", sample_tokens=True).eval()
    z = latents(0, 1, 1, 1).expand(1, C, 200, 200)
    counts = q.code_counts(draws.assign(z, torch.Generator().manual_seed(0)), K)
    expected = draws.proj(z[..., :1, :1]).softmax(1).flatten()
    torch.testing.assert_close(counts / counts.sum(), expected, atol=0.01, rtol=0)


def test_kept_codes_of_a_map_with_a_catch_all() -> None:
    new_ids = torch.tensor([0, 2, 0, 1, 3, 0, 0, 0, 0, 0, 0, 0])
    used = q.used_from_map(new_ids)
    assert used.tolist() == [0, 3, 1, 4]
    made = make("nearest", used_codes=4, unknown_code="id", unknown_id=0)
    made.used.copy_(used)
    old = torch.arange(K)
    assert torch.equal(made.to_used(old), new_ids)
    assert made.to_all(torch.arange(4)).tolist() == used.tolist()
    assert made.num_tokens == 4
    with pytest.raises(ValueError, match="new id 1"):
        q.used_from_map(torch.tensor([0, 2]))


def test_new_ids_from_counts() -> None:
    ids = q.map_from_counts(torch.tensor([3, 0, 1, 0, 9]))
    assert ids.tolist() == [1, 0, 2, 0, 3]
    assert q.used_from_map(ids).tolist() == [1, 0, 2, 4]
    assert q.map_from_counts(torch.tensor([0, 5])).tolist() == [0, 1]
    assert q.map_from_counts(torch.tensor([2, 1, 7])).tolist() == [0, 1, 2]


def test_gumbel_codes_are_renumbered_after_the_choice_or_chosen_among_the_kept() -> None:
    z, plain = 3 * latents(1), make("gumbel")
    choice = plain.assign(z)
    chosen = choice.unique()
    counts = torch.zeros(K, dtype=torch.int64)
    counts[chosen[::2]] = 1  # every other one of the codes that these latents choose
    assert len(chosen) > 2
    ids = q.map_from_counts(counts)
    kept = q.used_from_map(ids)
    after = make("gumbel", used_codes=len(kept), unknown_code="id", unknown_id=0)
    among = make("gumbel", used_codes=len(kept))
    for made in (after, among):
        made.used.copy_(kept)
    assert torch.equal(after.to_used(after.assign(z)), ids[choice])
    assert torch.equal(after.eval()(z).tokens, choice)
    assert set(among.assign(z).flatten().tolist()) <= set(kept.tolist())
    noise = q.gumbel_noise(plain.proj(z), torch.Generator().manual_seed(0))
    assert torch.equal(after(z, noise=noise).tokens, (plain.proj(z) + noise).argmax(1))


def test_unknown_codes_may_become_random_kept_ones() -> None:
    made = make("nearest", used_codes=3, unknown_code="random")
    made.used.copy_(torch.tensor([7, 1, 4]))
    old = torch.arange(K).repeat(20)
    new = made.to_used(old, torch.Generator().manual_seed(0))
    assert set(new.tolist()) == {0, 1, 2}
    assert new[old == 7].unique().tolist() == [0]
    assert len(new[old == 0].unique()) == 3
    assert torch.equal(new, made.to_used(old, torch.Generator().manual_seed(0)))


def test_usage_and_perplexity() -> None:
    counts = q.code_counts(torch.tensor([[0, 1], [2, 3]]), 8)
    assert q.usage(counts) == 0.5
    assert float(q.perplexity(counts)) == pytest.approx(4, rel=1e-5)
    assert float(q.perplexity(torch.tensor([9, 0]))) == pytest.approx(1)
