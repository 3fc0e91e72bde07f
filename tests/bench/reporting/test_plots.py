"""Pictures of results."""

from fastadapt.bench.protocol import Results, Timeline
from fastadapt.bench.reporting import plots
from tests.helpers.bench_results import results_of


def test_titles_name_the_commit_of_older_benchmarks():
    results = results_of()
    old = results_of(commit="0000000", date="2025-01-01")
    results.benchmarks["cladapter"] = old.benchmarks["cluster_attention"]
    titles = {axes.get_title() for axes in plots.speedups(results).axes}
    assert {"cluster_attention", "cladapter (0000000)"} <= titles
    legend = plots.roofline(results).axes[0].get_legend().get_texts()
    assert {"cluster_attention", "cladapter (0000000)"} <= {text.get_text() for text in legend}
    line = Timeline("two stages", "ours", "warm", {"start": 1.0}, 2.0)
    results.benchmarks["cladapter"].timelines.append(line)
    assert [axes.get_title() for axes in plots.phases(results).axes] == ["two stages (0000000)"]


def test_pictures(tmp_path):
    path = tmp_path / "r.json"
    written = plots.write_plots(path, results_of())
    assert written == [plots.paths(path)[kind] for kind in ("speedup", "size", "roofline")]
    for picture in written:
        assert picture.read_bytes().startswith(b"\x89PNG")
    titles = [axes.get_title() for axes in plots.speedups(results_of()).axes]
    assert "cluster_attention" in titles
    assert plots.write_plots(path, Results(None)) == []


def test_noise_is_not_drawn_as_a_speedup():
    assert plots.speedups(results_of(width=1.5)) is None
