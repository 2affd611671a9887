"""Runs as users have them: several processes, signals, full disks, changed settings."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import two_processes as together
from forked import SERVER, Command, call
from safetensors.torch import load_file

from spherical_lfm.engine.features import extract_features
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.runs import checkpoints, newest_checkpoint
from spherical_lfm.fidelity import score_features
from spherical_lfm.sampling import load_run
from spherical_lfm.sit import SIZES
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.training import TrainConfig, Trainer, model_flops

BIN = Path(sys.executable).parent
SMALL = ['--model', 'SiT-Ti/2', '--batch_size', '16', '--log_every', '1', '--ema_decay', '0.9', '--lr', '0.002']
CONFIG = dict(model='SiT-Ti/2', batch_size=16, log_every=1, ema_decay=.9, lr=2e-3)
ENV = os.environ | {'OMP_NUM_THREADS': '1'}


@pytest.fixture(scope='module')
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cache')/'latents'
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), folder, Encoding(flip=False), progress=False)
    return folder


def losses(run): return [json.loads(line)['loss'] for line in (Path(run)/'log.jsonl').read_text().splitlines()]


def launch(*args): return subprocess.run([*map(str, args)], capture_output=True, text=True, timeout=300, env=ENV)


@pytest.fixture(scope='module')
def pair(latents, tmp_path_factory):
    "What two gloo processes made (see two_processes.py), beside what one makes."
    out = tmp_path_factory.mktemp('pair')
    for arm, more in together.ARMS.items(): together.fit(latents, out/f'one-{arm}', arm, **more)
    together.fit(latents, out/'half-one', until=6)
    together.fit(latents, out/'one-map', flow_map=2)
    together.fit(latents, out/'one-started', flow_map=2, start=str(out/'one-map'))
    result = launch(BIN/'torchrun', '--standalone', '--nproc_per_node', 2, together.__file__, latents, out)
    assert result.returncode == 0, result.stderr[-3000:]
    together.fit(latents, out/'fsdp-half')
    return out


@pytest.mark.parametrize('run,one', [('ddp-spherical-slerp', 'one-spherical-slerp'), ('ddp-vanilla-linear', 'one-vanilla-linear'), ('fsdp-vanilla-linear', 'one-vanilla-linear'), ('accumulated', 'one-spherical-slerp'),
                                     ('fsdp', 'one-spherical-slerp'), ('fsdp-half', 'one-spherical-slerp'), ('half-one', 'one-spherical-slerp'), ('ddp-map', 'one-map'), ('fsdp-map', 'one-map'), ('fsdp-started', 'one-started')])
def test_two_processes_train_as_one_does(pair, run, one):
    "Data parallel, accumulated, sharded; from two processes to one and from one to two."
    rows = lambda name: Trainer.log(SimpleNamespace(out=pair/name))
    a, b = rows(one), rows(run)
    assert len(a) == len(b) == 12 and a[-1]['loss'] < rows('one-map' if one == 'one-started' else one)[0]['loss']
    if one == 'one-started': assert b[0]['loss'] < .97*rows('one-map')[0]['loss'], 'it began with weights of its own'
    for k in ('loss', 'loss_over_power', 'grad_norm'): assert [r[k] for r in b] == pytest.approx([r[k] for r in a], rel=5e-4), k
    x, y = (load_run(pair/n)[0].state_dict() for n in (one, run))
    for k in x: torch.testing.assert_close(y[k], x[k], rtol=0, atol=2e-3)


def test_two_processes_were_two(pair):
    "A launcher that quietly starts one process would make the comparison above vacuous."
    for rank in (0, 1): assert 'batch_size 15 cannot be divided among 2 processes' in (pair/f'refused-{rank}').read_text()
    seen = {f.name: json.loads(f.read_text())['count'] for f in (pair/'latents').glob('latents-*.json')}
    assert len(seen) == 8 and sum(seen.values()) == 1438


def test_two_processes_encode_and_sample_as_one_does(pair, latents, tmp_path):
    whole, parts = (LatentDataset(f, verify=True, resident=True) for f in (latents, pair/'latents'))
    assert torch.equal(whole.y, parts.y)
    torch.testing.assert_close(parts.z['z'], whole.z['z'], atol=1e-4, rtol=0)
    alone, shards = together.samples(tmp_path), [load_file(f) for f in sorted((pair/'samples').glob('features-*.safetensors'))]
    both = {k: torch.cat([s[k] for s in shards]) for k in shards[0]}
    torch.testing.assert_close(both['features'], alone['features'], atol=2e-3, rtol=0)
    reference = {'features': extract_features(digits_images('train')[0], 'digits')}
    for k, v in score_features(alone, reference).items(): assert score_features(both, reference)[k] == pytest.approx(v, rel=1e-3), k


def test_resume_in_a_new_process_is_exact(latents, tmp_path):
    assert call('slfm_train', latents, tmp_path/'whole', '--steps', 10, *SMALL).returncode == 0
    for steps in (4, 10): assert call('slfm_train', latents, tmp_path/'parts', '--steps', steps, *SMALL).returncode == 0
    assert losses(tmp_path/'whole') == losses(tmp_path/'parts')
    a, b = (load_run(tmp_path/n)[0].state_dict() for n in ('whole', 'parts'))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_0(latents, tmp_path, which):
    process = Command('slfm_train', latents, tmp_path/'run', '--steps', 100_000, *SMALL)
    log = tmp_path/'run'/'log.jsonl'
    for _ in range(1200):
        if log.exists() and log.read_text().count('\n') > 3: break
        time.sleep(.1)
    os.kill(process.pid, which)
    result = process.wait(30)
    assert result.returncode == 0 and 'stopped by a signal' in result.stdout
    found = checkpoints(tmp_path/'run')
    assert len(found) == 1 and int(found[0].name.removeprefix('step-')) == json.loads((found[0]/'state.json').read_text())['step'] > 3


@pytest.mark.parametrize('which', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_the_first_step_is_not_kept_waiting(latents, tmp_path, monkeypatch, which):
    "It compiles; and what compiles for it was ended by the same signal, so that it would wait for ever."
    def step(self):
        signal.raise_signal(which)
        pytest.fail('the step went on')
    trainer, second = (Trainer(TrainConfig(steps=2, **CONFIG), LatentDataset(latents, project=project), tmp_path/'run') for _ in range(2))
    first = Trainer.train_step
    monkeypatch.setattr(Trainer, 'train_step', step)
    with pytest.raises(InterruptedError, match='^spherical-slerp was stopped before its first step was done: run the same command to go on$'): trainer.fit(progress=False)
    assert not checkpoints(tmp_path/'run')
    monkeypatch.setattr(Trainer, 'train_step', first)
    assert second.fit(progress=False)['step'] == 2


def test_full_disk_leaves_the_old_checkpoint_usable(latents, tmp_path):
    run = tmp_path/'run'
    assert call('slfm_train', latents, run, '--steps', 2, *SMALL).returncode == 0
    result = call('slfm_train', latents, run, '--steps', 4, *SMALL, largest=2_000_000)
    assert result.returncode == 1 and 'cannot write' in result.stderr and 'untouched' in result.stderr and 'Traceback' not in result.stderr
    assert [c.name for c in checkpoints(run)] == ['step-00000002']
    assert not list(run.rglob('.slfm-tmp-*'))
    assert call('slfm_train', latents, run, '--steps', 4, *SMALL).returncode == 0


def test_changed_settings_and_architecture_are_refused(latents, tmp_path):
    data = LatentDataset(latents, project=project)
    fit = lambda **k: Trainer(TrainConfig(steps=2, **CONFIG | k), data, tmp_path).fit(progress=False)
    fit()
    for change, words in (({'seed': 1}, 'seed: 0 -> 1'), ({'model': 'SiT-Ti/4'}, 'SiT-Ti/2 -> SiT-Ti/4'), ({'batch_size': 8}, 'batch_size: 16 -> 8')):
        with pytest.raises(ValueError, match=words): fit(**change)
    with pytest.raises(ValueError, match='needs LatentDataset'): Trainer(TrainConfig(arm='vanilla-linear', **CONFIG), data, tmp_path)
    with pytest.raises(ValueError, match='up to 9, but classes are 0 to 4'): Trainer(TrainConfig(**CONFIG), data, tmp_path, classes=5)


def test_damaged_checkpoints_are_passed_over(latents, tmp_path):
    data = LatentDataset(latents, project=project)
    fit = lambda steps, **k: Trainer(TrainConfig(steps=steps, checkpoint_every=2, **CONFIG), data, tmp_path).fit(progress=False, **k)
    fit(6)
    newest = checkpoints(tmp_path)[-1]/'optimizer.safetensors'
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match='step-00000006 is damaged'): assert load_run(tmp_path)[2]['step'] == 4
    with pytest.warns(UserWarning, match='step-00000006 is damaged'): assert fit(8)['step'] == 8
    with pytest.raises(ValueError, match='resume is never'): fit(8, resume='never')
    with pytest.raises(ValueError, match='is no checkpoint'): fit(8, resume=tmp_path/'nothing')
    for c in checkpoints(tmp_path): (c/'state.json').unlink()
    with pytest.raises(ValueError, match='all checkpoints in .* are damaged'): fit(8)


def test_only_the_newest_are_kept(latents, tmp_path):
    Trainer(TrainConfig(steps=8, checkpoint_every=2, keep=2, **CONFIG), LatentDataset(latents, project=project), tmp_path).fit(progress=False)
    assert [c.name for c in checkpoints(tmp_path)] == ['step-00000006', 'step-00000008']


def _worker(latents, out, every):
    torch.set_num_threads(1)
    Trainer(TrainConfig(steps=100, checkpoint_every=every, keep=3, **CONFIG), LatentDataset(latents, project=project), out).fit(progress=False)


def test_kill_9_at_any_moment_loses_nothing(latents, tmp_path):
    "Ten kills within a checkpoint and ten after one, then the weights of an undisturbed run."
    start = lambda out, every=1: (p := SERVER.Process(target=_worker, args=(latents, out, every)), p.start())[0]
    whole = start(tmp_path/'whole', 1000)
    whole.join(120)
    assert whole.exitcode == 0
    run, moments, reached = tmp_path/'run', np.random.default_rng(0), []
    for kill in range(20):
        begun, deadline = ('.slfm-tmp-', 'step-')[kill % 2], time.monotonic() + 60
        folders = lambda: {f.name for f in (run/'checkpoints').glob(f'{begun}*')}
        before, process = folders(), start(run)
        while process.is_alive() and time.monotonic() < deadline and not folders() - before: time.sleep(.001)
        time.sleep(moments.uniform(0, .03))
        process.kill()
        process.join()
        found = newest_checkpoint(run)
        reached.append(found.name if found else None)
        if found: load_run(run)
    assert 10 <= len(set(reached)) < 20, reached # ten got on by a checkpoint at least, and not all of the others
    last = start(run, 1000)
    last.join(120)
    assert last.exitcode == 0 and not list(run.rglob('.slfm-tmp-*'))
    a, b = (load_run(tmp_path/n)[0].state_dict() for n in ('whole', 'run'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path/'whole') == losses(run)


def test_divergence_names_step_batch_and_checkpoint(latents, tmp_path):
    data = LatentDataset(latents, project=project)
    with pytest.raises(FloatingPointError, match='lower lr.*none yet'): Trainer(TrainConfig(steps=60, **CONFIG | {'lr': 1e18}), data, tmp_path/'a').fit(progress=False)
    assert not checkpoints(tmp_path/'a')
    trainer = Trainer(TrainConfig(steps=60, **CONFIG | {'log_every': 10, 'checkpoint_every': 5}), data, tmp_path/'b')
    draws = trainer.draws
    trainer.draws = lambda step: tuple(x*torch.nan if step == 7 and x.is_floating_point() and x.ndim == 4 else x for x in draws(step))
    with pytest.raises(FloatingPointError, match='at step 7 .*step-00000005'): trainer.fit(progress=False)
    assert json.loads((tmp_path/'b'/'divergence.json').read_text()) == {'step': 7, 'batch': trainer.order.indices(7).tolist()}
    assert [c.name for c in checkpoints(tmp_path/'b')] == ['step-00000005']


def test_exhausted_memory_says_which_knob_helps(latents, tmp_path):
    trainer = Trainer(TrainConfig(steps=3, **CONFIG), LatentDataset(latents, project=project), tmp_path)
    trainer.loss_fn = lambda *_: torch.empty(2**55) # a real failure of the allocator
    with pytest.raises(torch.OutOfMemoryError, match='raise accumulate'): trainer.fit(progress=False)
    assert not checkpoints(tmp_path)


def test_the_log_says_how_fast_and_how_good(latents, tmp_path):
    trainer = Trainer(TrainConfig(steps=20, trackers='tensorboard', **CONFIG | {'log_every': 10, 'batch_size': 64}), LatentDataset(latents, project=project), tmp_path)
    trainer.fit(progress=False)
    row = trainer.log()[-1]
    assert {'loss', 'loss_over_power', 'grad_norm', 'images_per_second', 'tflops', 'mfu', 'data_wait', 'loss_q1', 'loss_q4'} <= set(row)
    assert row['tflops']*1e12 == pytest.approx(3*model_flops(trainer.net)*row['images_per_second'], rel=.02)
    assert 0 < row['mfu'] <= 1.5 and 0 <= row['data_wait'] < .5
    assert list(tmp_path.rglob('events*'))


def test_loss_by_quarter_is_the_loss_split_by_time(latents, tmp_path):
    trainer = Trainer(TrainConfig(**CONFIG | {'batch_size': 64}), LatentDataset(latents, project=project), tmp_path)
    loss, t = trainer.loss_fn(trainer.model, trainer.path, *(draws := trainer.draws(0)))[0].detach(), draws[2]
    found = trainer.figures({k: v.float() for k, v in trainer.train_step().items()})
    for q in range(4): assert found[f'loss_q{q + 1}'] == pytest.approx(loss[(t >= q/4) & (t < (q + 1)/4)].mean().item(), rel=1e-5)


@pytest.mark.parametrize('extra', [dict(coupling='transport'), dict(jacobi=True), dict(project_velocity=False), dict(time_shift=3.), dict(time_sampling='logit-normal'), dict(checkpointing=True), dict(accumulate=4)])
def test_options_train_and_resume(latents, tmp_path, extra):
    data = LatentDataset(latents, project=project)
    make = lambda out: Trainer(TrainConfig(steps=8, **CONFIG | extra), data, out)
    whole = make(tmp_path/'whole')
    whole.fit(progress=False)
    make(tmp_path/'parts').fit(until=3, progress=False)
    parts = make(tmp_path/'parts')
    parts.fit(progress=False)
    assert [r['loss'] for r in parts.log()] == [r['loss'] for r in whole.log()]
    plain = Trainer(TrainConfig(steps=8, **CONFIG), data, tmp_path/'plain')
    plain.fit(progress=False)
    same = [r['loss'] for r in plain.log()] == pytest.approx([r['loss'] for r in whole.log()], rel=1e-4)
    assert same == ('checkpointing' in extra or 'accumulate' in extra)


@pytest.mark.parametrize('wrong,words', [(dict(arm='vanilla-linear', coupling='transport'), 'spherical arms'), (dict(arm='spherical-linear', jacobi=True), 'belongs to slerp'), (dict(accumulate=0), 'at least 1'),
                                         (dict(time_shift=-1.), 'must be positive'), (dict(parallel='horovod'), 'must be one of'), (dict(arm='vanilla-shell', project_velocity=False), 'none to switch off')])
def test_settings_that_make_no_sense(wrong, words):
    with pytest.raises(ValueError, match=words): TrainConfig(**wrong)


def test_bf16_and_compile_train(latents, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, 'Ti', (64, 1, 2)) # what is compiled matters here, not how much of it
    data = LatentDataset(latents, project=project)
    plain = Trainer(TrainConfig(steps=3, **CONFIG), data, tmp_path/'plain')
    plain.fit(progress=False)
    for name, extra in (('bf16', dict(precision='bf16')), ('compiled', dict(compile=True))):
        trainer = Trainer(TrainConfig(steps=3, **CONFIG | extra), data, tmp_path/name)
        trainer.fit(progress=False)
        assert [r['loss'] for r in trainer.log()] == pytest.approx([r['loss'] for r in plain.log()], rel=2e-2)
        load_run(tmp_path/name)
