"""Stand-ins for Transformer Engine and torch.cuda without CUDA; only `prune_distill.nemo.backend` uses them."""
