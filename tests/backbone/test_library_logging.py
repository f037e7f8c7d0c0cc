import logging
import subprocess
import sys
import warnings

import pytest
import torch

from lorafit.backbone import redirect_library_logs
from lorafit.backbone.bitsandbytes_import import compiling_when_called
from lorafit.errors import RunDirError
from tiny_models import save_base


def test_warnings_logs_and_homeless_records_go_to_the_file_and_not_to_the_console(tmp_path, capfd):
    log = tmp_path / "runs" / "log.txt"
    with redirect_library_logs(log):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU %s", "gemm_4bit_forward")
        logging.getLogger("transformers.modeling_utils").warning("weights were not used")
        logging.getLogger("torch.distributed").warning("a torch line")
        warnings.warn("a deprecated thing", FutureWarning, stacklevel=1)
    text = log.read_text()
    for words in ("gemm_4bit_forward", "weights were not used", "a torch line", "FutureWarning: a deprecated thing"):
        assert words in text
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_importing_and_loading_say_nothing_on_the_console_and_all_of_it_in_the_log(tmp_path):
    base = save_base(tmp_path / "base")
    # the line that an AVX512-BF16 machine prints, put where bitsandbytes prints it: at its import
    script = f"""
import logging, pathlib, sys
class Loud:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            sys.meta_path.remove(self)
            logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
sys.meta_path.insert(0, Loud())
from lorafit.backbone import load_backbone, redirect_library_logs
from lorafit.config import RunConfig
with redirect_library_logs(pathlib.Path({str(tmp_path / "log.txt")!r})):
    load_backbone(RunConfig(base={str(base)!r}))
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler's import takes seconds, and nothing is compiled"
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")
    assert "Failed to load CPU gemm_4bit_forward" in (tmp_path / "log.txt").read_text()


def test_everything_is_put_back_even_after_an_error(tmp_path):
    logger = logging.getLogger("transformers")
    before = (list(logger.handlers), logger.propagate, logging.lastResort, warnings.showwarning)
    with pytest.raises(ValueError, match="boom"), redirect_library_logs(tmp_path / "log.txt"):
        assert logger.handlers != before[0]
        raise ValueError("boom")
    assert (list(logger.handlers), logger.propagate, logging.lastResort, warnings.showwarning) == before


def test_an_inner_block_writes_to_the_outer_ones_file(tmp_path):
    log = tmp_path / "log.txt"
    with redirect_library_logs(log):
        with redirect_library_logs():
            logging.getLogger("peft").warning("inner")
        logging.getLogger("peft").warning("outer")
    assert [line.rsplit(" ", 1)[1] for line in log.read_text().splitlines()] == ["inner", "outer"]


def test_a_library_that_joins_inside_a_block_is_caught_by_the_next_one(tmp_path, capfd):
    with redirect_library_logs(tmp_path / "log.txt"):
        logger = logging.getLogger("kernels")
        logger.handlers = [logging.StreamHandler()]
        with redirect_library_logs():
            logger.warning("late")
    logger.handlers = []
    assert capfd.readouterr().err == "" and "late" in (tmp_path / "log.txt").read_text()


def test_the_applications_own_logging_is_left_alone(tmp_path, caplog):
    with redirect_library_logs(tmp_path / "log.txt"):
        logging.getLogger("my.app").warning("hello")
    assert "hello" in caplog.text


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="log"), redirect_library_logs(tmp_path / "file" / "log.txt"):
        pass


def test_a_block_whose_log_is_optional_goes_on_without_it(tmp_path, capfd):
    (tmp_path / "log.txt").mkdir()
    with redirect_library_logs(tmp_path / "log.txt", optional=True):
        logging.getLogger("peft").warning("said")
    assert capfd.readouterr() == ("", "")


def test_what_a_library_compiles_at_its_import_is_compiled_at_the_first_call(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    with compiling_when_called():

        @torch.compile(dynamic=False)
        def twice(value):
            return 2 * value

        half = torch.compile(lambda value: value / 2)
    assert asked == []
    assert [twice(2), twice(3), half(4)] == [4, 6, 2]
    assert asked == [{"dynamic": False}, {}]
