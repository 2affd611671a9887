"""Commands at work: what they write, what they print. Mistakes and their sentences are in test_inputs.py."""
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from forked import call

from spherical_lfm.engine.images import ImageSource
from spherical_lfm.engine.latents import Encoding, encode_latents
from spherical_lfm.tokenizers import load_tokenizer

COMMANDS = ['slfm_demo', 'slfm_analyze', 'slfm_probe', 'slfm_finetune', 'slfm_compare', 'slfm_encode', 'slfm_train', 'slfm_sample', 'slfm_evaluate', 'slfm_bench']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A trained run of a few steps, and its latents."
    folder = tmp_path_factory.mktemp('cli')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder/'latents', Encoding(flip=False), progress=False)
    assert call('slfm_train', folder/'latents', folder/'run', '--preset', 'digits', '--steps', 3, '--log_every', 1).returncode == 0
    return folder


def test_console_scripts():
    "One as it is installed; the others differ in their name alone."
    installed = {e.name: e.value for e in entry_points(group='console_scripts') if e.name.startswith('slfm_')}
    assert installed == {c: f'spherical_lfm.tools.cli:{c}' for c in COMMANDS}
    result = subprocess.run([str(Path(sys.executable).parent/'slfm_train'), '/no/latents', '/no/run'], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and 'make them with slfm_encode' in result.stderr and 'Traceback' not in result.stderr


def test_another_tokenizers_latents_are_refused(run, tmp_path):
    stranger = load_tokenizer('digits')
    stranger.autoencoder.encoder.conv_in.weight.data.mul_(1.01)
    stranger.save_pretrained(tmp_path/'stranger')
    result = call('slfm_sample', run/'run', tmp_path/'images', '--tokenizer', tmp_path/'stranger')
    assert result.returncode == 1 and 'is not the one this run was trained on' in result.stderr


def test_sampling_is_reproducible_and_the_pipeline_agrees(run, tmp_path):
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    from spherical_lfm.engine.runs import seeded_generator
    from spherical_lfm.tools.pipeline import SphericalSiTPipeline
    for name in ('a', 'b'):
        assert call('slfm_sample', run/'run', tmp_path/name, '--count', 3, '--steps', 4, '--seed', 5).returncode == 0
    read = lambda name: torch.stack([pil_to_tensor(Image.open(f)) for f in sorted((tmp_path/name).rglob('0*.png'))])
    assert torch.equal(read('a'), read('b'))
    pipe = SphericalSiTPipeline.from_run(run/'run')
    pipe.save_pretrained(tmp_path/'pipe')
    pipe = SphericalSiTPipeline.from_pretrained(tmp_path/'pipe')
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1, 2], num_inference_steps=4, generator=[seeded_generator('cpu', 5, 3, n) for n in range(3)]).images
    assert (torch.stack([pil_to_tensor(i) for i in images]).int() - read('a').int()).abs().max() == 0


def test_samples_as_an_adm_file_are_scored(run, tmp_path):
    assert call('slfm_sample', run/'run', tmp_path/'s', '--count', 20, '--steps', 3, '--method', 'adams2', '--guidance', 2, '--guide_to', 0.5, '--npz').returncode == 0
    result = call('slfm_evaluate', tmp_path/'s.npz', 'digits', '--extractor', 'digits', '--size', 16, '--bootstrap', 5, '--save_reference_to', tmp_path/'r.npz', '--out', tmp_path/'a.json')
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path/'a.json').read_text())
    assert figures['fd_interval'][0] < figures['fd'] and figures['protocol']['samples'] == 20
    stored = call('slfm_evaluate', tmp_path/'s.npz', tmp_path/'r.npz', '--extractor', 'digits', '--against', tmp_path/'a.json', '--out', tmp_path/'b.json')
    assert stored.returncode == 0 and 'cannot be compared' in stored.stderr and 'reference: r.npz against digits' in stored.stderr
    assert json.loads((tmp_path/'b.json').read_text())['fd'] == pytest.approx(figures['fd'], rel=1e-6)


def test_a_run_is_scored_without_files(run, tmp_path):
    line = ['slfm_evaluate', run/'run', 'digits', '--extractor', 'digits', '--size', 16, '--count', 24, '--steps', 3, '--save', 'png', '--out', tmp_path/'a.json']
    result = call(*line)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path/'a.json').read_text())
    assert figures['protocol']['samples'] == 24 and figures['protocol']['method'] == 'euler' and 'is' in figures
    assert len(list((run/'run'/'features'/'evaluate').glob('images-*/*/*.png'))) == 24


def test_commands_print_nothing_of_libraries(run, tmp_path):
    "What stands on stderr is ours: progress, what was understood of the images, notes."
    finetune = ['--steps', 1, '--perceptual', 'none', '--extractor', 'none', '--held_out', 'digits', '--held_out_count', 16]
    progress = r'it/s|s/\w+|/s\]|\?it|\?shard|\?image|\?batch|^digits|^  |\| 0/'
    for line in (['slfm_encode', 'digits', 'digits', tmp_path/'z', '--no_flip'],
                 ['slfm_train', run/'latents', tmp_path/'run', '--preset', 'digits', '--steps', 2],
                 ['slfm_sample', tmp_path/'run', tmp_path/'s', '--count', 4, '--steps', 2],
                 ['slfm_analyze', 'digits', 'digits', '--count', 32, '--out', tmp_path/'a'],
                 ['slfm_finetune', 'digits', 'digits', tmp_path/'f', *finetune]):
        result = call(*line)
        assert result.returncode == 0, result.stderr
        lines = re.split(r'[\r\n]+', result.stderr)
        strange = [row for row in lines if row.strip() and not re.search(progress, row)]
        assert not strange, (line[0], strange)
