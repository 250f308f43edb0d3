"""The worker process around llama.cpp: one process runs one model (`python -m ash.slices.worker FD`).

`messages` is what the server and the worker say to each other; everything else runs in the worker only.
"""
