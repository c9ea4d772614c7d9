"""``gpunvme accept BDF``: every path and tier tried on a machine's own drive, and a table of what came of it.

`session` is the whole: the drive is looked at (`drive`), each step of the `plan` runs in a child with a deadline
(`children`, `child`), and a process of its own (`guard`) gives the drive back, whatever becomes of the rest. What the
steps do is in `steps`.
"""
