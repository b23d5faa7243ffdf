"""Parts of a UNet that wait for memory and not for arithmetic, each as one operation: Triton on a GPU, plain torch elsewhere."""
