"""Stand-ins for Transformer Engine and torch.cuda where there is no CUDA; `recipes.runtime.backend` alone uses them."""
