"""Minitron pruning through ModelOpt: importance of layers, channels and heads, cutting by it, and scoring of shapes."""
