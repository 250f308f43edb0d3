"""Analytic, creative or conversational: observe each text, detect shifts, say what set them off. Pure."""
