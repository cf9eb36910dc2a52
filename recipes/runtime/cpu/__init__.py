"""What stands in for Transformer Engine and torch.cuda where there is no CUDA; used by `recipes.runtime.backend` alone."""
