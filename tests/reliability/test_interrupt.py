"""Ctrl-C ends a run with one line that says how to go on, and a resumed run is whole."""

import json
import re
import signal

from run_comparison import assert_same_training

from segalign.run_directory import newest_checkpoint

CANCELLED = 130


def test_ctrl_c_says_how_to_go_on(server, toy_config, tmp_path):
    log = tmp_path / "log.txt"
    permitted = ["--allow_import=toy_house", "--allow_import=toy_signals"]
    arguments = ["fit", *permitted, f"--config={toy_config}", "--ckpt_path=auto"]
    sent = json.dumps({"number": int(signal.SIGINT), "at_step": 7})
    interrupted = [
        "--trainer.callbacks+=toy_signals.Signal",
        f"--trainer.callbacks.init_args={sent}",
    ]
    broken, straight = tmp_path / "broken", tmp_path / "straight"
    server.start([*arguments, f"--run_dir={broken}", *interrupted], log)
    assert server.wait() == CANCELLED, log.read_text()
    (line,) = re.findall("stopped: (.*)$", log.read_text(), re.MULTILINE)
    assert line.startswith("ended by Ctrl-C")
    assert "`--ckpt_path auto`" in line
    assert "Traceback" not in log.read_text()
    assert newest_checkpoint(broken).name == "step-00000005"
    for run_dir in (broken, straight):
        server.start([*arguments, f"--run_dir={run_dir}"], log)
        assert server.wait() == 0, log.read_text()
    assert_same_training(broken, straight)
