"""Speed reports: what deconvolution costs beside what it replaces, where the time goes, how far it is from the floor.

``python -m tdeconv bench`` measures a set (``sets``) and prints its tables, ``report`` makes a page of results
(``reports``), ``profile`` looks into one model (``profiles``), ``guard`` holds what was reached. The suites are
pytest-benchmark's (``test_*.py``): ``cases`` and ``nets`` say what is measured, ``implementations`` who, ``steps`` and
``stages`` which parts, ``measure`` how, ``roofline`` what it must cost at least. ``python -m tdeconv.bench.results``
puts a run into ``results/<device>/``. And whether converted networks learn: ``python -m tdeconv.bench.learning``.
"""
