"""How the command line ends where somebody ends it: by Ctrl-C, or by reading no further."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

COMMAND = [sys.executable, "-m", "pspnet_fast.cli"]


def test_ctrl_c_is_one_line_and_130(tmp_path):
    """A picture that takes minutes, interrupted once the network is there."""
    Image.fromarray(np.zeros((2000, 3000, 3), np.uint8)).save(tmp_path / "large.png")
    arguments = ["predict", str(tmp_path / "large.png"), "--random-weights", "--layers", "18", "--device", "cpu"]
    arguments += ["--base-size", "3000", "--batch-size", "1", "--output", str(tmp_path / "out")]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    said = process.stderr.readline()  # that the network is untrained: it predicts from here on
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert "untrained" in said
    assert process.returncode == 130
    assert rest.split("\n") == ["", "pspnet-fast predict: interrupted", ""]


def test_a_reader_that_has_gone_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "doctor"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_name_that_the_terminal_cannot_show_ends_nothing(tmp_path):
    name = "h\N{LATIN SMALL LETTER U WITH DIAERESIS}tte\N{CAT FACE}"
    arguments = ["scenes", str(tmp_path / name), "--images", "1", "--size", "48", "48"]
    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ascii_terminal, check=False)
    assert done.returncode == 0, done.stderr
    assert "h\\xfctte\\U0001f431" in done.stdout


@pytest.mark.parametrize("argv", [[], ["--help"], ["nothing"]])
def test_status_of_the_parser(argv):
    done = subprocess.run([*COMMAND, *argv], capture_output=True, check=False)
    assert done.returncode == (0 if argv == ["--help"] else 2)


def test_what_is_said_of_a_file_does_not_obey_its_name(tmp_path):
    """A warning on the way, and the parser's own sentence, which repeats what a shell's pattern gave."""
    name = "a\x1b[31mred"
    Image.fromarray(np.zeros((9, 9, 4), np.uint8)).save(tmp_path / f"{name}.png")
    arguments = ["--random-weights", "--layers", "18", "--device", "cpu", "--output", str(tmp_path / "out")]
    for argv in (["predict", str(tmp_path / f"{name}.png"), *arguments], ["doctor", name]):
        done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False)
        assert "a\\x1b[31mred" in done.stderr
        assert "\x1b" not in done.stderr + done.stdout
    assert (tmp_path / "out" / f"{name}_labels.png").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "pspnet-fast doctor: its output cannot be written: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_output_ends_nothing(tmp_path, closed):
    """As services and schedulers start programs; two scenes have a progress bar."""
    line = f'exec "$@" {closed}'
    arguments = ["scenes", str(tmp_path / "scenes"), "--images", "1", "--size", "48", "48"]
    done = subprocess.run(["sh", "-c", line, "sh", *COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scenes" / "images" / "training" / "scene_00000001.jpg").exists()
