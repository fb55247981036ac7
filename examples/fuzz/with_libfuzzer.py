"""libFuzzer fuzzes a guest, by way of PyPI's atheris: python examples/fuzz/with_libfuzzer.py CORPUS -runs=100000."""

from pyvmm.fuzz import Target
from pyvmm.libfuzzer import fuzz
from record_target import record_parser

with Target(record_parser()) as target:
    fuzz(target)
