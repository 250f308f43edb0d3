"""Calibrated linear heads over encoder vectors, and the files of labelled examples they are fitted on.

Routing (intents) and modes both stand on this package; it knows neither of them.
"""
