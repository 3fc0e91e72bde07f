import pytest

from fastadapt.export.speed import format_rate, throughput


def test_throughput_counts_images():
    calls = []
    speed = throughput(lambda: calls.append(1), batch=4, seconds=0.001)
    assert isinstance(speed, float)
    assert len(calls) > 3


@pytest.mark.parametrize(
    "value,text", [(0.5234, "0.523"), (20.46, "20.5"), (991.2, "991"), (14_700.0, "14,700")]
)
def test_rates_have_three_digits(value, text):
    assert format_rate(value) == text
