"""A comparison of the paper in small: images on disk, published formats, two processes cut off twice, a report."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ['--images', 24, '--classes', 12, '--size', 64, '--width', 8, '--steps', 12, '--batch_size', 8, '--samples', 12,
         '--curve_samples', 12, '--solver_steps', 2, '--guidances', 1.5, '--metrics', 'fid', 'kid', 'is', 'prc', '--eager', '--stops', 'train', 'sample',
         '--extractor', 'efficientnet'] # Inception's 2,048 features cost four times as much


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    "Where scripts/dry_run.py has left everything."
    out = tmp_path_factory.mktemp('dry')/'run'
    command = [sys.executable, ROOT/'scripts'/'dry_run.py', '--out', out, *SMALL]
    result = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0 and result.stdout.endswith('equal\n'), result.stdout[-2000:] + result.stderr[-5000:]
    return out


def test_resumed_in_two_processes_is_undisturbed_in_one(out):
    "What is promised in numbers, and that the interruptions were where they should be."
    found = json.loads((out/'dry_run.json').read_text())
    assert found['equal'] and all(found['apart'][k] <= v for k, v in found['limits'].items())
    left = found['left']
    assert found['kept shards of latents'] and len(left['train']['latents']) == 8
    arm, _, saved = left['train']['checkpoints'][-1].partition('/checkpoints/step-')
    assert arm == 'spherical-slerp' and 3 < int(saved) <= 10, 'SIGTERM came in the fourth of twelve steps, and saved'
    assert 1 <= left['sample']['features'] <= 4


def test_every_phase_ran_and_left_what_it_should(out):
    "Latents of all images in both directions, checkpoints, metrics; no features, no unfinished file."
    found = json.loads((out/'dry_run.json').read_text())
    for name in ('several processes, interrupted', 'one process'):
        assert all(s > 0 for s in found[name]['seconds'].values()) and 100 < found[name]['peak_mib'] < 4000
    made = out/'interrupted'/'comparison'
    index, report = (json.loads((made/f).read_text()) for f in ('latents/index.json', 'report.json'))
    assert (index['count'], index['shape'], index['flip'], len(index['shards'])) == (24, [32, 8, 8], True, 8)
    assert index['tokenizer']['name'] == 'flux2' and len(index['source']['classes']) == 12
    preset = report['preset']
    assert (preset['tokenizer'], preset['train']['model'], preset['extractor']) == ('flux2', 'SiT-B/2', 'efficientnet')
    for row in report['arms'].values():
        assert row['steps'] == 12 and row['fd'] > 0 and [p['step'] for p in row['curve']] == [6, 12]
        assert {'fd', 'kid', 'is', 'precision', 'recall'} <= set(row['guided'][0])
        assert row['protocol']['reference_count'] == 24 and row['protocol']['decoder'] == 'flux2'
    assert not [f for f in made.rglob('*') if f.name.startswith(('features-', '.slfm-tmp-'))]
    assert found['classes_per_batch']['found'] == pytest.approx(found['classes_per_batch']['expected'], rel=.2)
