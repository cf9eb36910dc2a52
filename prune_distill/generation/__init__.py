"""Completions of prompts by a student, as training data of on-policy rounds."""
