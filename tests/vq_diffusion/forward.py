"""q(x_t | x_s) in full: what the lean corruption and its posteriors are compared with."""

import torch
from torch import Tensor


def forward_law(tokens: Tensor, keep: Tensor, replace: Tensor, mask: Tensor, codes: int) -> Tensor:
    """q(x_t | x_s): A or a for the token itself, B or b for every code, C or c for the mask.

    Args:
        tokens: [...] int64 in 0..K; a mask stays one.
        keep: probability to keep, broadcast to [...].
        replace: probability of each code to replace.
        mask: probability to mask.
        codes: K.

    Returns:
        [..., K + 1] in the dtype of `keep`.
    """
    masked = (tokens == codes)[..., None]
    law = replace[..., None].expand(*tokens.shape, codes + 1).clone()
    law += torch.nn.functional.one_hot(tokens, codes + 1) * keep[..., None]
    law[..., codes] = mask.expand(tokens.shape)
    only_mask = torch.arange(codes + 1, device=tokens.device) == codes
    return torch.where(masked, only_mask.to(law.dtype), law)
