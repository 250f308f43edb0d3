"""Child processes and the frames that travel between them and the server; knows nothing of models.

`child` is the server's end, `parent` the child's; both speak the frames of `frames`.
"""
