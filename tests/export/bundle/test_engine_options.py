import sys

import pytest

import fastadapt as fa
from fastadapt import cli
from fastadapt.export import EngineOptions
from fastadapt.export.backends import tensorrt


class TestOptions:
    @pytest.mark.parametrize(
        "options,message",
        [
            ({"precision": "fp8"}, "precision is 'fp8'; expected fp32, fp16 or bf16"),
            ({"targets": ("sm_89",)}, "`targets` is for TensorRT engines: add `trt=True`"),
            ({"workspace": 4}, "`workspace` is for TensorRT engines"),
            ({"workspace": -1, "trt": True}, "workspace is -1; expected MiB"),
            ({"int8_budget": 2.0}, "int8_budget is 2.0"),
            ({"calibration": "mean"}, "calibration is 'mean'; expected max or entropy"),
            ({"calibration": "entropy"}, "`calibration` is of INT8: add `int8=True`"),
            ({"trt": True, "targets": ("sm_1",)}, "targets is 'sm_1'"),
            ({"fp8": True, "aoti": True}, "`fp8` is made for fastadapt's own operations"),
        ],
    )
    def test_what_cannot_be_is_refused_before_any_work(self, options, message):
        with pytest.raises(fa.InputError, match=message):
            EngineOptions(**options).check()

    def test_the_command_line_refuses_before_it_loads(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(tensorrt, "load_flavour", lambda kind: None)
        args = ["fastadapt", "export", str(tmp_path / "none"), "--trt"]
        monkeypatch.setattr(sys, "argv", args)
        with pytest.raises(SystemExit):
            cli.main()
        assert "neither TensorRT nor TensorRT-RTX is installed" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
