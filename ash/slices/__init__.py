"""Slices: the catalogue of models, the engines that run them, and the worker around llama.cpp."""
