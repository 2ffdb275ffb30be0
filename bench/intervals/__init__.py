"""What statistics every few steps do to training: the demo's networks at several intervals, against batch norm.

``python -m tdeconv.bench.intervals`` trains and keeps every run in a JSON file, ``--time`` measures single steps into
the same file, ``--report`` makes tables of such files. ``runs`` says what is trained, on what, and keeps it;
``report`` compares.
"""
