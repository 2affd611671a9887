"""Runs as users have them: several processes, signals, full disks, changed settings."""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from spherical_lfm.latents import ImageSource, LatentDataset, encode_latents
from spherical_lfm.sampling import load_run
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.training import TrainConfig, Trainer, checkpoints

BIN = Path(sys.executable).parent
TRAIN = str(BIN/'slfm_train')
SMALL = ['--model', 'SiT-Ti/2', '--batch_size', '16', '--log_every', '1', '--ema_decay', '0.9', '--lr', '0.002']
CONFIG = dict(model='SiT-Ti/2', batch_size=16, log_every=1, ema_decay=.9, lr=2e-3)
ENV = os.environ | {'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, flip=False, progress=False)
    return folder


def losses(run): return [json.loads(line)['loss'] for line in (Path(run)/'log.jsonl').read_text().splitlines()]


def train(*args, **kwargs): return subprocess.run([*map(str, args)], capture_output=True, text=True, timeout=300, env=ENV, **kwargs)


@pytest.mark.parametrize('arm', ['spherical-slerp', 'vanilla-linear'])
def test_two_processes_give_the_same_curve(latents, tmp_path, arm):
    one = train(TRAIN, latents, tmp_path/'one', '--arm', arm, '--steps', 12, *SMALL)
    assert one.returncode == 0, one.stderr
    launch = [BIN/'accelerate', 'launch', '--cpu', '--num_processes', 2, '--num_machines', 1, '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', 0]
    two = train(*launch, TRAIN, latents, tmp_path/'two', '--arm', arm, '--steps', 12, *SMALL)
    assert two.returncode == 0, two.stderr
    a, b = losses(tmp_path/'one'), losses(tmp_path/'two')
    assert len(a) == len(b) == 12 and a[-1] < a[0]
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-4, atol=0)


def test_resume_in_a_new_process_is_exact(latents, tmp_path):
    assert train(TRAIN, latents, tmp_path/'whole', '--steps', 10, *SMALL).returncode == 0
    for steps in (4, 10): assert train(TRAIN, latents, tmp_path/'parts', '--steps', steps, *SMALL).returncode == 0
    assert losses(tmp_path/'whole') == losses(tmp_path/'parts')
    a, b = (load_run(tmp_path/n)[0].state_dict() for n in ('whole', 'parts'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_saves_and_exits_with_0(latents, tmp_path):
    process = subprocess.Popen([TRAIN, str(latents), str(tmp_path/'run'), '--steps', '100000', *SMALL], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    log = tmp_path/'run'/'log.jsonl'
    for _ in range(1200):
        if log.exists() and log.read_text().count('\n') > 3: break
        time.sleep(.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'stopped by a signal' in out
    found = checkpoints(tmp_path/'run')
    assert len(found) == 1 and int(found[0].name.removeprefix('step-')) == json.loads((found[0]/'state.json').read_text())['step'] > 3


def test_full_disk_leaves_the_old_checkpoint_usable(latents, tmp_path):
    run = tmp_path/'run'
    assert train(TRAIN, latents, run, '--steps', 2, *SMALL).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)) # writing beyond fails as on a full disk
    result = train(TRAIN, latents, run, '--steps', 4, *SMALL, preexec_fn=limit)
    assert result.returncode == 1 and 'cannot write' in result.stderr and 'untouched' in result.stderr and 'Traceback' not in result.stderr
    assert [c.name for c in checkpoints(run)] == ['step-00000002']
    assert not list((run/'checkpoints').glob('.step-*'))
    assert train(TRAIN, latents, run, '--steps', 4, *SMALL).returncode == 0


def test_changed_settings_and_architecture_are_refused(latents, tmp_path):
    data = LatentDataset(latents, spherical=True)
    fit = lambda **k: Trainer(TrainConfig(steps=2, **CONFIG | k), data, tmp_path).fit(progress=False)
    fit()
    for change, words in (({'seed': 1}, 'seed: 0 -> 1'), ({'model': 'SiT-Ti/4'}, 'SiT-Ti/2 -> SiT-Ti/4'), ({'batch_size': 8}, 'batch_size: 16 -> 8')):
        with pytest.raises(ValueError, match=words): fit(**change)
    with pytest.raises(ValueError, match='needs LatentDataset'): Trainer(TrainConfig(arm='vanilla-linear', **CONFIG), data, tmp_path)
    with pytest.raises(ValueError, match='labels go up to 9'): Trainer(TrainConfig(**CONFIG), data, tmp_path, classes=5)
    weights = checkpoints(tmp_path)[0]/'ema'/'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='damaged'): Trainer(TrainConfig(steps=3, **CONFIG), data, tmp_path).fit(progress=False)
    with pytest.raises(ValueError, match='damaged'): load_run(tmp_path)


def test_divergence_is_named(latents, tmp_path):
    with pytest.raises(FloatingPointError, match='lower lr'): Trainer(TrainConfig(steps=60, **CONFIG | {'lr': 1e18}), LatentDataset(latents, spherical=True), tmp_path).fit(progress=False)
    assert not checkpoints(tmp_path)


def test_bf16_and_compile_train(latents, tmp_path):
    data = LatentDataset(latents, spherical=True)
    plain = Trainer(TrainConfig(steps=3, **CONFIG), data, tmp_path/'plain')
    plain.fit(progress=False)
    for name, extra in (('bf16', dict(precision='bf16')), ('compiled', dict(compile=True))):
        trainer = Trainer(TrainConfig(steps=3, **CONFIG | extra), data, tmp_path/name)
        trainer.fit(progress=False)
        assert [r['loss'] for r in trainer.log()] == pytest.approx([r['loss'] for r in plain.log()], rel=2e-2)
        load_run(tmp_path/name)
