"""LDMAE (arXiv 2507.09984): masked autoencoders, and latent diffusion on their latents."""
