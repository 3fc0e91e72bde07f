"""What a terminal shows of names that a user gave."""

from pathlib import Path

from rich.console import Console

from fastadapt.progress import progress_bars
from fastadapt.train.results import TrainResult, summary_table


def test_brackets_in_names_are_no_markup(capsys):
    with progress_bars() as progress:
        progress.add_task("evaluate [bold]cells [v2]", total=2, unit="images", note="[/x]")
        progress.console.print("cells [v2]/run is finished already")
    assert "cells [v2]/run is finished already" in capsys.readouterr().err
    result = TrainResult(Path("cells [v2]/run"), {"epoch": 1, "stage": 1}, {})
    Console(markup=False).print(summary_table(result))
    assert "cells [v2]/run" in capsys.readouterr().out
