"""aquatint trains Stable Diffusion XL."""

__version__ = "0.1.0"
