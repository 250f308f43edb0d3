"""Measurements of Ash, each a script of its own; README.md says what they measure and how to read them."""
