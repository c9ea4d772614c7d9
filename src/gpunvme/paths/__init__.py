"""How bytes travel: one module a path, one protocol (`base`), one chooser (`choose`)."""
