"""Streaming: decoder, GPU and both are measured, and compared with the slower."""

from fastadapt.bench.suites import streaming


def test_three_rates_and_their_ratio(monkeypatch):
    monkeypatch.setenv(streaming.COUNT, "32")
    monkeypatch.setattr(streaming, "DISTINCT", 5)
    (found,) = streaming.run(quick=True)
    ((row,),) = found.tables.values()
    assert row["images"] == 32 and row["decoded by"] == "processes"
    rates = [row[name] for name in ("decoder alone", "GPU alone", "streamed")]
    assert all(int(rate.replace(",", "")) >= 0 for rate in rates)
    assert float(row["of the slower"]) >= 0
