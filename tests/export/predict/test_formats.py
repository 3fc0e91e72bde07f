"""Rows of CSV: as the csv module writes them, number by number."""

import csv
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastadapt.export.predict.columns import Column
from fastadapt.export.predict.formats import CsvFormat

TEXTS = st.lists(st.text(alphabet="ab ,;\"'\n\rü", max_size=5), min_size=3, max_size=3)


@given(
    TEXTS,
    TEXTS,
    arrays(np.float32, (3, 2), elements=st.floats(width=32)),
    st.tuples(TEXTS, TEXTS),
)
def test_a_part_is_what_the_csv_module_writes(tmp_path_factory, paths, labels, numbers, others):
    columns = [Column("path"), Column("p", ("a", "b"), numbers=True)]
    columns += [Column("n", ("a", "b")), Column("label")]
    made = CsvFormat(columns)
    made.add([paths, numbers, np.array(others, object).T, labels])
    file = tmp_path_factory.mktemp("rows") / "part"
    made.write_part(file)
    expected = io.StringIO()
    rows = zip(paths, numbers.tolist(), *others, labels, strict=True)
    csv.writer(expected, lineterminator="\n").writerows(
        [path, *(f"{x:.7g}" for x in row), *texts] for path, row, *texts in rows
    )
    assert file.read_bytes() == expected.getvalue().encode()
