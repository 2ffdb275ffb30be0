"""Speed reports: what deconvolution costs beside what it replaces.

``python -m tdeconv.bench.run`` measures into ``bench-out/`` and prints the tables; ``python -m tdeconv.bench.table FILE.json --keep``
puts a run into ``bench/results/<device>/``. The suites are pytest-benchmark's (``test_*.py``): ``cases`` says what is
measured, ``implementations`` who, ``steps`` and ``stages`` which parts, ``measure`` how.
"""
