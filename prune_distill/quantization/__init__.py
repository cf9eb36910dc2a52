"""Quantize an exported model with ModelOpt, write the formats of engines, and read them back with plain PyTorch."""
