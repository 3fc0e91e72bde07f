from fastadapt.bench.protocol import Part, Record, Result, Results, Spread, Timeline
from fastadapt.bench.reporting.headline import headline


def results():
    """Results of a step, a whole command and a deployment, where ours takes half the time."""
    times = {name: Spread(us, us, us) for name, us in (("ours", 500.0), ("upstream", 14_000.0))}
    record = Record("vit_base_patch16_224, 8", "backbone, batch", 8)
    record.parts["cached"] = Part(wall_us=times)
    lines = [
        Timeline("two stages", "ours", "cold", {}, 40.0),
        Timeline("two stages", "ours", "warm", {}, 20.0),
        Timeline("two stages", "plain", "warm", {}, 110.0),
    ]
    rows = [
        {"runtime": "AOTInductor bf16, CUDA graph", "256": "12,000"},
        {"runtime": "bf16, torch.compile, CUDA graph", "256": "10,000"},
        {"runtime": "target", "256": "10,500 / 12,000: met"},
    ]
    return Results(
        "NVIDIA H100",
        {
            "training": Result(records=[record]),
            "end_to_end": Result(timelines=lines),
            "deployment": Result(tables={"ViT-B/16, images per second": rows}),
        },
    )


def test_whole_commands_come_first_and_say_what_they_are_compared_with():
    job, step, deployed = headline(results(), "results.md")
    assert job["fastadapt"] == "20 s" and job["alternative"] == "110 s, PyTorch and timm"
    assert job["factor"] == "[5.5×](results.md)"
    assert step["fastadapt"] == "500.0 µs" and step["alternative"].startswith("14 ms")
    assert step["factor"] == "[28×](results.md)"
    assert deployed[""].endswith("AOTInductor bf16")
    assert deployed["factor"] == "[1.2×](results.md)"


def test_what_was_not_measured_has_no_row():
    assert headline(Results("NVIDIA H100"), "results.md") == []
