import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import main
from segalign.run_directory import describe_files
from segalign.scenes import shipping
from segalign.scenes.held_out import HeldOutModel
from segalign.scenes.models import scorer_model
from segalign.scenes.scorers import HeldOutScorer, ScenesScorer
from segalign.scenes.world import get_world


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
    (checkpoint / "state.json").write_text('{"global_step": 2}')
    meta = {"format_version": 1, "files": describe_files(checkpoint)}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
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


def test_the_preference_model_is_packed_beside_a_base(tmp_path, capsys, monkeypatch):
    model = scorer_model(get_world("3x3"))
    run, folder = tmp_path / "run", tmp_path / "weights"
    checkpoint = run / "checkpoints" / "step-00000002"
    for made in (checkpoint, run / "logs", folder):
        made.mkdir(parents=True)
    state = {f"scorer.model.{k}": v for k, v in model.state_dict().items()}
    state["scorer.model.logit_scale"] = torch.tensor([3.0])  # one-dimensional, as training has it
    save_file(state, checkpoint / "model.safetensors")
    (checkpoint / "state.json").write_text('{"global_step": 2}')
    meta = {"format_version": 1, "files": describe_files(checkpoint)}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    scorer = {"init_args": {"weights": "shipped"}}
    config = {"model": {"init_args": {"scorer": scorer}}, "data": {}, "seed_everything": 7}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "logs" / "metrics.csv").write_text("step,val/r_at_1\n1,0.5\n")
    (folder / "provenance.json").write_text('{"runs": {"scorer": 1}, "held_out_scorer": 2}')
    monkeypatch.setattr(shipping, "_NUM_SCORED", 4)
    argv = ["scenes", "pack-preference", f"--scorer={run}", f"--output={folder}"]
    assert main.main(argv) == 0
    assert "pairs " in capsys.readouterr().out
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (provenance["runs"], provenance["held_out_scorer"]) == ({"scorer": 1}, 2)
    assert provenance["preference_scorer"]["scores"].keys() == {"pairs", "pairs_whole"}
    monkeypatch.setattr("segalign.scenes.weights.shipped_folder", lambda: folder)
    packed = ScenesScorer(weights="preference").load()
    assert float(packed.logit_scale) == 3.0
    weight = model.state_dict()["visual_projection.weight"]
    torch.testing.assert_close(
        packed.model.state_dict()["visual_projection.weight"], weight, atol=1e-3, rtol=1e-3
    )
