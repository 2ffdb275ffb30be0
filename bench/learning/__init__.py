"""Do converted networks learn? Public networks trained with batch norm and converted: same start, data and rates.

``python -m tdeconv.bench.learning`` trains and keeps every run in a JSON file, ``--report`` makes tables of such files.
``networks`` says who is trained, ``tasks`` on what, ``train`` how; ``store`` keeps the runs, ``report`` compares them.
"""
