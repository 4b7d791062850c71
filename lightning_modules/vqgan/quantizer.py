"""Latents to codes: nearest code, EMA, l2-normalised and Gumbel quantizers.

`forward` changes no state; what training changes besides gradients (EMA sums, restarted codes) is
done by `update`, called once per batch after the optimizer step.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_modules.vqgan.config import ModelConfig

MAX_DISTANCES = 2**24
"""Entries of the distance matrix that are held at once (64 MiB of float32)."""


@dataclass
class Quantized:
    """What a quantizer makes of latents."""

    codes: Tensor
    """[B, c, h, w] code vectors with the gradient towards the latents"""
    tokens: Tensor
    """[B, h, w] int64 in [0, num_codes)"""
    loss: Tensor
    """scalar float32"""


class Quantizer(nn.Module, ABC):
    """What every quantizer offers, and the renumbering of kept codes."""

    used: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.temperature = config.temperature
        if config.used_codes:
            self.register_buffer("used", torch.arange(config.used_codes))

    @property
    def num_tokens(self) -> int:
        """Number of token ids handed out: all codes, or the kept ones and an extra id."""
        if not self.config.used_codes:
            return self.config.num_codes
        return self.config.used_codes + (self.config.unknown_code == "extra")

    @abstractmethod
    def codebook(self) -> Tensor:
        """Return all code vectors [K, c]."""

    @abstractmethod
    def assign(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map latents [B, c, h, w] to codes [B, h, w] int64; `generator` is for sampled codes."""

    @abstractmethod
    def update(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> None:
        """Take this rank's latents [B, c, h, w] and codes [B, h, w] into the running statistics.

        Once per training batch; the CPU generator chooses latents that replace unused codes.
        """

    def lookup(self, tokens: Tensor) -> Tensor:
        """Map codes [B, h, w] in [0, K) to code vectors [B, c, h, w]."""
        return F.embedding(tokens, self.codebook()).permute(0, 3, 1, 2)

    def to_used(self, tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Renumber codes [...] in [0, K) to their place among the kept ones.

        A code that was not kept becomes `len(used)`, a random kept id or `unknown_id`. Without
        kept codes the tokens are returned as they are.
        """
        if not self.config.used_codes:
            return tokens
        kept = self.used.numel()
        place = torch.full((self.config.num_codes,), -1, device=tokens.device)
        place[self.used] = torch.arange(kept, device=tokens.device)
        new = place[tokens]
        if self.config.unknown_code == "random":
            device = generator.device if generator is not None else tokens.device
            drawn = torch.randint(kept, tokens.shape, generator=generator, device=device)
            return torch.where(new < 0, drawn.to(tokens.device), new)
        unknown = kept if self.config.unknown_code == "extra" else self.config.unknown_id
        return torch.where(new < 0, unknown, new)

    def to_all(self, tokens: Tensor) -> Tensor:
        """Undo `to_used` on ids [...]; the extra id becomes the first kept code."""
        if not self.config.used_codes:
            return tokens
        return self.used[torch.where(tokens < self.used.numel(), tokens, 0)]


class NearestQuantizer(Quantizer):
    """Nearest code by squared distance, straight-through gradient (van den Oord et al. 2017).

    loss = mean|sg(e) - z|^2 * b1 + mean|e - sg(z)|^2 * b2 with (b1, b2) = (beta, 1), or (1, beta)
    with legacy_beta, which is how taming and LDM trained (VectorQuantizer2, legacy=True).
    """

    idle: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.num_codes, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.num_codes, 1 / config.num_codes)
        if config.restart_after:
            self.register_buffer("idle", torch.zeros(config.num_codes, dtype=torch.int64))

    def codebook(self) -> Tensor:
        """Return all code vectors [K, c]."""
        return self.embedding.weight

    def assign(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map latents [B, c, h, w] to the nearest codes [B, h, w]."""
        b, _, h, w = z.shape
        return nearest(_rows(self._prepared(z.float())), self.codebook()).view(b, h, w)

    def forward(
        self, z: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Quantized:
        """Quantize latents [B, c, h, w]; arithmetic is float32 under any autocast."""
        with torch.autocast(z.device.type, enabled=False):
            tokens = self.assign(z)
            latents = self._prepared(z.float())
            e = self.lookup(tokens)
            loss = self._loss(latents, e)
            codes = latents + (e - latents).detach()
        return Quantized(codes.to(z.dtype), tokens, loss)

    @torch.no_grad()
    def update(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> None:
        """Replace every code unused for `restart_after` batches by a random latent of this one."""
        if not self.config.restart_after:
            return
        counts = _sum_over_ranks(code_counts(tokens, self.config.num_codes))  # [K]
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))
        dead = (self.idle >= self.config.restart_after).nonzero().squeeze(1)  # [D]
        if not len(dead):
            return
        rows = _rows(z.detach().float())  # [N, c]
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        chosen = rows[order[torch.arange(len(dead), device=rows.device) % len(order)]]  # [D, c]
        if _distributed():
            # every rank must hold the same codes, so rank 0's choice is everybody's
            dist.broadcast(chosen, 0)
        self._replace(dead, chosen)
        self.idle[dead] = 0

    def _prepared(self, z: Tensor) -> Tensor:
        return z

    def _loss(self, z: Tensor, e: Tensor) -> Tensor:
        commitment, codebook = F.mse_loss(z, e.detach()), F.mse_loss(e, z.detach())
        if self.config.legacy_beta:
            return commitment + self.config.beta * codebook
        return self.config.beta * commitment + codebook

    def _replace(self, dead: Tensor, vectors: Tensor) -> None:
        self.embedding.weight[dead] = vectors


class L2Quantizer(NearestQuantizer):
    """Codes and latents of unit length (Yu et al. 2022, section 3.2; LlamaGen's quantizer).

    With entropy_weight the loss has w * (mean H(p) - H(mean p)), p = softmax(-d / 0.01), which
    holds all N x K probabilities at once.
    """

    def codebook(self) -> Tensor:
        """Return all code vectors [K, c], normalised."""
        return F.normalize(self.embedding.weight, dim=-1)

    def _prepared(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def _loss(self, z: Tensor, e: Tensor) -> Tensor:
        loss = F.mse_loss(e, z.detach()) + self.config.beta * F.mse_loss(z, e.detach())
        if self.config.entropy_weight:
            rows, codes = _rows(z), self.codebook()
            d = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
            loss = loss + self.config.entropy_weight * entropy_loss(d)
        return loss

    def _replace(self, dead: Tensor, vectors: Tensor) -> None:
        self.embedding.weight[dead] = F.normalize(vectors, dim=-1)


class EMAQuantizer(NearestQuantizer):
    """Nearest code whose vectors are running means of their latents (van den Oord, appendix A).

    m_i = sums_i / n_i with n_i = (size_i + eps) / (N + K eps) * N; counts and sums are added over
    all ranks. loss = beta * mean|sg(e) - z|^2 with the codes before the update.
    """

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding.weight.requires_grad_(False)
        # sizes start at 1: from 0, the first update would multiply every unused code by 1 / eps
        self.register_buffer("cluster_size", torch.ones(config.num_codes))
        self.register_buffer("embed_avg", self.embedding.weight.detach().clone())

    def _loss(self, z: Tensor, e: Tensor) -> Tensor:
        return self.config.beta * F.mse_loss(z, e.detach())

    @torch.no_grad()
    def update(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> None:
        """Move every code towards the mean of its latents; once per training batch."""
        k, decay, eps = self.config.num_codes, self.config.decay, self.config.eps
        rows = _rows(z.detach().float())
        counts = _sum_over_ranks(code_counts(tokens, k).float())  # [K]
        sums = torch.zeros_like(self.embed_avg).index_add_(0, tokens.flatten(), rows)  # [K, c]
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embed_avg.mul_(decay).add_(_sum_over_ranks(sums), alpha=1 - decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + eps) / (total + k * eps) * total
        self.embedding.weight.copy_(self.embed_avg / smoothed.unsqueeze(1))
        super().update(z, tokens, generator)

    def _replace(self, dead: Tensor, vectors: Tensor) -> None:
        super()._replace(dead, vectors)
        self.cluster_size[dead] = 1.0
        self.embed_avg[dead] = vectors


class GumbelQuantizer(Quantizer):
    """Codes drawn by Gumbel-softmax over learnt logits (Jang et al. 2017; taming GumbelQuantize).

    loss = kl_weight * mean over positions of sum_k q_k log(q_k K + 1e-10), q = softmax(logits).
    Outside training the code is argmax(logits), or a draw with sample_tokens. With kept codes only
    these have logits (taming); but with unknown_code=id all have, and the code is renumbered
    afterwards (VQ-Diffusion).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.restricted = bool(config.used_codes) and config.unknown_code != "id"
        self.proj = nn.Conv2d(config.code_dim, config.num_codes, 1)
        self.embed = nn.Embedding(config.num_codes, config.code_dim)

    def codebook(self) -> Tensor:
        """Return all code vectors [K, c]."""
        return self.embed.weight

    def update(self, z: Tensor, tokens: Tensor, generator: torch.Generator | None = None) -> None:
        """Keep no statistics: logits and codes learn by gradient alone."""

    def assign(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Map latents [B, c, h, w] to codes [B, h, w]: argmax, or a draw with sample_tokens."""
        b, _, h, w = z.shape
        weight, bias = self.proj.weight.flatten(1), self.proj.bias
        if self.restricted:
            weight, bias = weight[self.used], None if bias is None else bias[self.used]
        with torch.autocast(z.device.type, enabled=False):
            picked = []
            for rows in _rows(z.float()).split(max(1, MAX_DISTANCES // weight.shape[0])):
                logits = F.linear(rows, weight, bias)  # [n, K]
                if self.config.sample_tokens:
                    logits = logits + gumbel_noise(logits, generator)
                picked.append(logits.argmax(1))
        tokens = torch.cat(picked).view(b, h, w)
        return self.used[tokens] if self.restricted else tokens

    def forward(
        self, z: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Quantized:
        """Quantize latents [B, c, h, w]; arithmetic is float32 under any autocast.

        Gumbel noise [B, K, h, w], of the kept codes alone where only they have logits, is drawn
        where it is needed and missing, by the generator on the device of z.
        """
        with torch.autocast(z.device.type, enabled=False):
            logits, embed = self.proj(z.float()), self.embed.weight  # [B, K, h, w], [K, c]
            if self.restricted:
                logits, embed = logits[:, self.used], embed[self.used]
            q, k = logits.softmax(1), self.config.num_codes
            loss = self.config.kl_weight * (q * (q * k + 1e-10).log()).sum(1).mean()
            if noise is None and (self.training or self.config.sample_tokens):
                noise = gumbel_noise(logits, generator)
            if noise is None:
                tokens = logits.argmax(1)
                codes = F.embedding(tokens, embed).permute(0, 3, 1, 2)
            else:
                soft = ((logits + noise) / self.temperature).softmax(1)
                tokens = soft.argmax(1)
                if self.config.straight_through or not self.training:
                    hard = torch.zeros_like(soft).scatter_(1, tokens.unsqueeze(1), 1.0)
                    soft = hard - soft.detach() + soft
                codes = torch.einsum("bkhw,kc->bchw", soft, embed)
        if self.restricted:
            tokens = self.used[tokens]
        return Quantized(codes.to(z.dtype), tokens, loss)


QUANTIZERS: dict[str, type[NearestQuantizer] | type[GumbelQuantizer]] = {
    "nearest": NearestQuantizer,
    "ema": EMAQuantizer,
    "l2": L2Quantizer,
    "gumbel": GumbelQuantizer,
}


@torch.no_grad()
def nearest(rows: Tensor, codes: Tensor) -> Tensor:
    """Return the code e [K, c] of least |z - e|^2 for rows z [N, c]: [N]; in bounded memory."""
    rows, codes = rows.float(), codes.float()
    norms = codes.square().sum(1)  # |z|^2 is the same for all codes and is left out
    chunks = rows.split(max(1, MAX_DISTANCES // codes.shape[0]))
    with torch.autocast(rows.device.type, enabled=False):  # it would flip near ties
        return torch.cat([torch.addmm(norms, r, codes.T, alpha=-2).argmin(1) for r in chunks])


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw Gumbel(0, 1) noise of the shape, dtype and device of `like`."""
    return -torch.empty_like(like).exponential_(generator=generator).log()


def entropy_loss(distances: Tensor, temperature: float = 0.01) -> Tensor:
    """Return mean H(p) - H(mean p) with p = softmax(-d / temperature), d [N, K]."""
    log_p = (-distances / temperature).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


def code_counts(tokens: Tensor, num_codes: int) -> Tensor:
    """Count each code in tokens [...]: [K] int64."""
    return torch.bincount(tokens.flatten(), minlength=num_codes)


def perplexity(counts: Tensor) -> Tensor:
    """Return exp of the entropy of a code histogram [K]; 1e-10 inside the logarithm."""
    p = counts.float() / counts.sum()
    return (-(p * (p + 1e-10).log()).sum()).exp()


def usage(counts: Tensor) -> Tensor:
    """Return the share of codes that occur in a histogram [K]."""
    return (counts > 0).float().mean()


def map_from_counts(counts: Tensor) -> Tensor:
    """Return new ids [K] for codes that occurred counts [K] times: 1, 2, ..., and 0 for none.

    This is VQ-Diffusion's form (2886 codes of 8192 keep an id of their own, 5306 share id 0). Where
    every code occurred they keep their ids.
    """
    seen = counts > 0
    if bool(seen.all()):
        return torch.arange(len(counts))
    return seen.cumsum(0) * seen


def used_from_map(new_ids: Tensor) -> Tensor:
    """Return the kept codes of a map [K] that gives every old code its new id in [0, max].

    For each new id this is the first old code; codes beyond it fall together, so a map with a
    catch-all id 0 (VQ-Diffusion's `taming_vqvae_2887.pt`) is unknown_code=id with unknown_id=0.

    Raises:
        ValueError: an id of the range that no code has.
    """
    first = torch.full((int(new_ids.max()) + 1,), -1, dtype=torch.int64)
    for old in reversed(range(len(new_ids))):
        first[new_ids[old]] = old
    if (first < 0).any():
        raise ValueError(f"no code has the new id {int((first < 0).nonzero()[0])}")
    return first


def _rows(z: Tensor) -> Tensor:
    """Turn [B, c, h, w] into [B*h*w, c]."""
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _distributed():
        dist.all_reduce(x)
    return x
