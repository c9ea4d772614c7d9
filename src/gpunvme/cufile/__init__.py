"""GPUDirect Storage through cuFile: the library, its driver, what it keeps registered, and the proof of what it did.

`paths.cufile` makes paths of it. Nothing here is imported before somebody asks for one of them, or for `explain()`.
"""
