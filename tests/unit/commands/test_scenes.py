import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import main
from segalign.scenes import shipping
from segalign.scenes.held_out import HeldOutModel
from segalign.scenes.scorers import HeldOutScorer


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: expected a sub-command of `main.py scenes`, one of pack-base, pack-held-out"),
        (["nonsense"], "error: argument subcommand: invalid choice: 'nonsense'"),
        (["pack-base"], "error: the following arguments are required: scorer"),
        (["pack-base", "--scorer=a", "--generator=b", "--typo=c"], "error: unrecognized arguments"),
        (["pack-held-out"], "error: the following arguments are required: scorer"),
    ],
)
def test_errors_are_one_line_with_a_code(capsys, argv, message):
    assert main.main(["scenes", *argv]) == 78
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert "see `python main.py scenes" in error


def test_the_held_out_scorer_is_packed_beside_a_base(tmp_path, capsys, monkeypatch):
    model = HeldOutModel(36)
    run, folder = tmp_path / "run", tmp_path / "weights"
    checkpoint = run / "checkpoints" / "step-00000002"
    for made in (checkpoint, run / "logs", folder):
        made.mkdir(parents=True)
    save_file(
        {f"model.{k}": v for k, v in model.state_dict().items()}, checkpoint / "model.safetensors"
    )
    (checkpoint / "meta.json").write_text('{"format_version": 1, "files": {}}')
    config = {"model": {"init_args": {}}, "data": {}, "seed_everything": 7}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "logs" / "metrics.csv").write_text("step,val/dense_accuracy\n1,0.5\n")
    monkeypatch.setattr(shipping, "score_held_out", lambda folder: {"clean": 0.25})
    argv = ["scenes", "pack-held-out", f"--scorer={run}", f"--output={folder}"]
    assert main.main(argv) == 65
    assert "it has no readable `provenance.json`; run `scenes pack-base`" in capsys.readouterr().err
    (folder / "provenance.json").write_text('{"runs": {"scorer": 1}}')
    assert main.main(argv) == 0
    assert capsys.readouterr().out.endswith("clean 0.250\n")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["runs"] == {"scorer": 1}
    assert provenance["held_out_scorer"]["run"]["steps"] == 2
    assert provenance["held_out_scorer"]["scores"] == {"clean": 0.25}
    monkeypatch.setattr("segalign.scenes.weights.shipped_folder", lambda: folder)
    packed = HeldOutScorer().load().model.state_dict()
    weight = model.text.state_dict()["transformer.resblocks.0.mlp.c_fc.weight"]
    torch.testing.assert_close(
        packed["text.transformer.resblocks.0.mlp.c_fc.weight"], weight, atol=1e-3, rtol=1e-3
    )
    file = load_file(folder / "held_out_scorer.safetensors")
    assert file["text.token_embedding.weight.rows"].dtype == torch.float16
