"""VQ-Diffusion: image tokens are masked and replaced, then restored (arXiv 2111.14822)."""
