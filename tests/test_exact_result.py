"""A stored result against today's code: seed 0 of the digits preset at a twelfth of its steps, a tenth of its samples.

`python tests/test_exact_result.py` trains it and writes `tests/exact_result.json`. Do so when the method or a draw is
meant to change, and say why.
"""
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

STORED = Path(__file__).parent/'exact_result.json'
STEPS = {'spherical-slerp': 100, 'vanilla-linear': 12, 'vanilla-shell': 12, 'spherical-linear': 12}


def train(root: Path) -> dict:
    "Losses of every step of each arm, and what so short a training of the method is worth."
    from spherical_lfm.engine.images import ImageSource
    from spherical_lfm.engine.latents import LatentDataset
    from spherical_lfm.experiments import PRESETS, prepare_latents, prepare_reference, run_arm
    from spherical_lfm.paths import ARMS
    from spherical_lfm.training import TrainConfig, Trainer
    digits = PRESETS['digits']
    preset = replace(digits, train=digits.train | {'steps': 100, 'checkpoint_every': 100, 'log_every': 1}, samples=144)
    source = ImageSource('digits')
    prepare_latents(preset, source, root/'latents', progress=False)
    reference = prepare_reference(preset, source, root, progress=False)
    losses = {}
    for arm, steps in STEPS.items():
        data = LatentDataset(root/'latents', project=ARMS[arm].projection)
        trainer = Trainer(TrainConfig(arm=arm, **preset.train), data, root/arm)
        if arm != 'spherical-slerp': trainer.fit(until=steps, progress=False)
        else: row = run_arm(preset, arm, root/'latents', reference, root/arm, curve=False, progress=False)
        losses[arm] = [r['loss'] for r in trainer.log()]
    return {'losses': losses, 'accuracy': row['accuracy'], 'fd': row['fd'] if 'fd' in row else row['fid']}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(tmp_path_factory.mktemp('result'))
    torch.set_num_threads(threads)


@pytest.mark.parametrize('arm', list(STEPS))
def test_four_arms_lose_what_they_lost(found, arm):
    "Other processors add in another order, which a hundred steps make larger: a thousandth at most."
    want = json.loads(STORED.read_text())['losses'][arm]
    assert len(found['losses'][arm]) == len(want) == STEPS[arm]
    assert found['losses'][arm][:10] == pytest.approx(want[:10], rel=1e-4)
    assert found['losses'][arm] == pytest.approx(want, rel=1e-3)


def test_figures_are_what_they_were(found):
    want = json.loads(STORED.read_text())
    assert found['fd'] == pytest.approx(want['fd'], rel=.02)
    assert found['accuracy'] == pytest.approx(want['accuracy'], abs=.03)


if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp: result = train(Path(tmp))
    rounded = {arm: [float(f'{v:.7g}') for v in values] for arm, values in result['losses'].items()}
    note = f'python tests/{Path(sys.argv[0]).name}, one thread, torch {torch.__version__}'
    STORED.write_text(json.dumps(result | {'losses': rounded, 'command': note}, indent=1) + '\n')
