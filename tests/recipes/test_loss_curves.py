from __future__ import annotations

from pathlib import Path

from recipes.loss_curves import LossCurves


def test_curves_are_drawn_and_survive_a_checkpoint(tmp_path: Path) -> None:
    curves = LossCurves(path=str(tmp_path / "run" / "loss.png"), every_n_steps=5)
    curves.train, curves.val = [(5, 7.0), (10, 6.0)], [(10, 6.5)]
    resumed = LossCurves(path=str(tmp_path / "run" / "loss.png"), every_n_steps=5)
    resumed.load_state_dict(curves.state_dict())
    assert (resumed.train, resumed.val) == (curves.train, curves.val)
    resumed.draw()
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
