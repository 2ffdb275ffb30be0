"""What is done for GPUs: a visit to one (``report``), and compiling for those that are not here (``aot``).

Of the source tree alone, as its tests are: not shipped. ``tree`` makes that tree importable where nothing is installed.
"""
