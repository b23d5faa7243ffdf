"""The pure math of diffusion: tensors in, tensors out, no config, no files.

Notation of the whole room: x0 the clean latents, e the noise, x_t = alpha x0 + sigma e with alpha^2 + sigma^2 = 1.
"""
