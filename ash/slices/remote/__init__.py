"""Slices that run elsewhere: an OpenAI-compatible endpoint behind the port Engine."""
