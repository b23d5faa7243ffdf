"""Optimizers in plain torch: each update is one pure function, each class is plumbing around it."""
