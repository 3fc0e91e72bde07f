"""Blocks of documents follow the current results of each machine."""

from pathlib import Path

import pytest

from fastadapt.bench.reporting import documents, plots
from fastadapt.bench.reporting import results as stored
from fastadapt.errors import InputError
from tests.helpers.bench_results import results_of, write

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_documents_show_the_current_results(name):
    """After a new run: python -m fastadapt.bench.reporting.documents."""
    document = ROOT / name
    text = document.read_text()
    assert documents.BLOCK.search(text)
    assert documents.render(text, document, ROOT) == text


def test_every_picture_and_markdown_file_belongs_to_current_results(tmp_path):
    for path, results in stored.current(ROOT / "bench" / "results").items():
        copy = tmp_path / path.parent.name / path.name
        copy.parent.mkdir()
        stored.write_markdown(copy, results)
        markdown = path.with_suffix(".md")
        assert markdown.read_text() == copy.with_suffix(".md").read_text(), markdown
        pictures = {file.name for file in path.parent.glob("*.png")}
        assert pictures <= {picture.name for picture in plots.paths(path).values()}


def test_the_current_results_of_a_machine_reach_the_documents(tmp_path):
    results = tmp_path / "bench" / "results"
    path = write(results / "nvidia-h100/results.json", results_of(date="2026-03-01"))
    other = results_of(ours=10.0, date="2026-04-01", gpu="NVIDIA H200")
    write(results / "nvidia-h200/results.json", other)
    text = (
        "# T\n<!-- bench: all H100 -->\nstale\n<!-- /bench -->\n"
        "<!-- bench: plots H100 -->\n<!-- /bench -->\n<!-- bench: gdpl H100 -->\n<!-- /bench -->\n"
        "<!-- bench: overview H100 -->\n<!-- /bench -->\n"
    )
    made = documents.render(text, tmp_path / "README.md", tmp_path)
    assert "stale" not in made
    assert "| 1 × 2 | 50.0 / 80.0 (1.60×) |" in made
    assert "(bench/results/nvidia-h100/results.md)" in made
    assert made.count("Not measured on an H100 yet.") == 2
    assert (
        "| cluster_attention, forward | 1 × 2 | 50.0 µs | 80.0 µs (compiled) | 1.60× "
        "| 1.60 to 1.60× |" in made
    )
    assert documents.render(made, tmp_path / "README.md", tmp_path) == made
    written = documents.draw(tmp_path)
    assert results / "nvidia-h200" / "results-roofline.png" in written
    assert path.with_suffix(".md").exists()
    made = documents.render(made, tmp_path / "docs" / "b.md", tmp_path)
    assert "![Roofline](../bench/results/nvidia-h100/results-roofline.png)" in made
    with pytest.raises(InputError, match="'warp', which is no benchmark"):
        documents.render("<!-- bench: warp H100 -->\n<!-- /bench -->", path, tmp_path)


def test_the_command_writes_and_checks(tmp_path, capsys):
    write(tmp_path / "bench/results/h100/results.json", results_of())
    for name in documents.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<!-- bench: all H100 -->\n<!-- /bench -->\n")
    assert documents.main(["--check"], tmp_path) == 1
    assert "out of date: README.md, docs/benchmarks.md" in capsys.readouterr().err
    assert documents.main([], tmp_path) == 0
    assert documents.main(["--check"], tmp_path) == 0
