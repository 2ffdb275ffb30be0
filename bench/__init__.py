"""Speed reports: pytest-benchmark suites, the cases and implementations they run over, and the tables they become."""
