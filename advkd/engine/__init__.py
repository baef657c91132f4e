"""Engines: a network made ready to run, and the sampling loops over it.

    engine = advkd.compile(student, 64)
    images = engine.run(x_T)                       # (B, C, H, W) in and out

One interface (`Engine`), an engine a file: `eager` (torch modules, a loop in Python), `cpu` (a plan
of C++ kernels and the C++ loop), `cuda` (a captured graph and the C++ loop over it).
"""
