"""Hypothesis looks for an input that crashes a guest, and shrinks it: pytest examples/fuzz/with_hypothesis.py."""

import hypothesis
from hypothesis import strategies as st
from pyvmm.fuzz import Target
from record_target import record_parser

target = Target(record_parser())
records = st.lists(st.tuples(st.sampled_from("nd"), st.integers(0, 255), st.binary(max_size=8)))


@hypothesis.settings(max_examples=1000, deadline=None, database=None)
@hypothesis.given(records)
def test_no_records_crash_the_parser(records: list[tuple[str, int, bytes]]) -> None:
    """Fails with the shortest input: a record that is longer than what follows."""
    data = b"".join(kind.encode() + bytes([length]) + content for kind, length, content in records)
    result = target.run(data)
    hypothesis.target(float(sum(counter > 0 for counter in result.coverage)))
    assert not result.crash, f"{data!r}: {result.exit}"
