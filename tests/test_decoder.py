"""Finetuning as clusters treat it: several processes, signals, restarts, broken images; and what comes out of it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from forked import Command, call

from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig, finetune_decoder, reconstruction_metrics
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.runs import checkpoints
from spherical_lfm.engine.weights import DATA
from spherical_lfm.tokenizers import load_tokenizer, measure_statistics, standardise
from spherical_lfm.tools.studies import finetune_study

BIN = Path(sys.executable).parent
ENV = os.environ | {'OMP_NUM_THREADS': '1'}
QUICK = dict(steps=12, batch_size=16, lr=5e-4, perceptual='none', discriminator_start=4, log_every=1, checkpoint_every=5, flip=False)
COMMAND = ['--size', '16', '--perceptual', 'none', '--batch_size', '16', '--lr', '5e-4', '--discriminator_start', '4', '--log_every', '1', '--no_flip', '--extractor', 'digits']


def losses(run): return [r['l1'] for line in (Path(run)/'log.jsonl').read_text().splitlines() if 'l1' in (r := json.loads(line))]

def start(spherical=True): return load_tokenizer(DATA/'digits'/'vanilla', spherical=spherical)


@pytest.mark.parametrize('change', [{}, {'precision': 'bf16'}, {'flip': True, 'perceptual': 'efficientnet', 'steps': 3, 'discriminator_start': 1}])
def test_encoder_stays_decoder_learns(tmp_path, change):
    images, _ = digits_images('train')
    tuned, log = finetune_decoder(start(), images, FinetuneConfig(**QUICK | change), tmp_path, images[:32], progress=False)
    before, after = start().autoencoder.state_dict(), tuned.autoencoder.state_dict()
    for k in before: assert torch.equal(before[k], after[k]) == (not k.startswith(('decoder', 'post_quant_conv'))), k
    assert all(r['weight'] == 0 for r in log if r['step'] <= QUICK['discriminator_start'] and 'weight' in r and not change.get('steps'))
    assert any(r.get('weight', 0) > 0 for r in log) and log[-1]['held_out_psnr'] > 10
    assert (tmp_path/'strips'/f'step-{FinetuneConfig(**QUICK | change).steps:08d}.png').exists()


def test_interrupted_anywhere_ends_the_same(tmp_path):
    images, _ = digits_images('train')
    whole, _ = finetune_decoder(start(), images, FinetuneConfig(**QUICK), tmp_path/'whole', images[:8], progress=False)
    for until in (3, 7, 12): DecoderTrainer(start(), images, FinetuneConfig(**QUICK), tmp_path/'parts', images[:8]).fit(until=until, progress=False)
    parts = DecoderTrainer(start(), images, FinetuneConfig(**QUICK), tmp_path/'parts', images[:8])
    parts.fit(progress=False)
    assert parts.finetuned().identity == whole.identity
    assert losses(tmp_path/'parts') == losses(tmp_path/'whole')


def test_what_may_not_change_and_what_is_damaged(tmp_path):
    images, _ = digits_images('train')
    fit = lambda tokenizer=None, data=images, **k: DecoderTrainer(tokenizer or start(), data, FinetuneConfig(**QUICK | {'steps': 6} | k), tmp_path, images[:8]).fit(progress=False)
    fit()
    for change, words in (({'lr': 1e-3}, 'lr: 0.0005 -> 0.001'), ({'data': images[:100]}, 'images count: 1438 -> 100'), ({'tokenizer': start(False)}, 'tokenizer')):
        with pytest.raises(ValueError, match=words): fit(**change)
    for folder in reversed(checkpoints(tmp_path)):
        weights = folder/'ema.safetensors'
        weights.write_bytes(weights.read_bytes()[:999])
        if folder != checkpoints(tmp_path)[0]:
            with pytest.warns(UserWarning, match='is damaged: going on from the one before'): assert fit(steps=6)['step'] == 6
            weights.write_bytes(weights.read_bytes()[:999])
    with pytest.raises(ValueError, match='all checkpoints .* are damaged'): fit(steps=7)
    assert len(checkpoints(tmp_path)) == 2


def test_divergence_is_named(tmp_path):
    images, _ = digits_images('train')
    with pytest.raises(FloatingPointError, match='lower lr'): finetune_decoder(start(), images, FinetuneConfig(**QUICK | {'lr': 1e20}), tmp_path, progress=False)


def test_two_processes_do_what_one_does(tmp_path):
    launch = [BIN/'torchrun', '--standalone', '--nproc_per_node', '2', '--no-python'] # accelerate starts one process where there is no GPU
    command = lambda out: ['slfm_finetune', 'digits', 'digits', out, '--steps', '8', '--arms', 'spherical', *COMMAND]
    two = [*launch, BIN/command('')[0], *command(tmp_path/'two')[1:]]
    for result in (call(*command(tmp_path/'one')), subprocess.run([*map(str, two)], capture_output=True, text=True, timeout=300, env=ENV)):
        assert result.returncode == 0, result.stderr[-3000:]
    a, b = losses(tmp_path/'one'/'spherical'), losses(tmp_path/'two'/'spherical')
    assert len(a) == len(b) == 8
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-3, atol=0)
    weight = lambda out: [json.loads(line).get('weight', 0.) for line in (tmp_path/out/'spherical'/'log.jsonl').read_text().splitlines()]
    assert max(weight('one')) > 0 and weight('one') == pytest.approx(weight('two'), rel=.05)


def test_sigterm_saves_and_the_same_line_goes_on(tmp_path):
    command = ['slfm_finetune', 'digits', 'digits', tmp_path/'run', *COMMAND, '--arms', 'spherical']
    process = Command(*command, '--steps', 100_000)
    log = tmp_path/'run'/'spherical'/'log.jsonl'
    for _ in range(1200):
        if log.exists() and log.read_text().count('\n') > 3: break
        time.sleep(.1)
    os.kill(process.pid, signal.SIGTERM)
    result = process.wait(60)
    assert result.returncode == 0 and 'stopped and saved at step' in result.stderr
    step = int(checkpoints(tmp_path/'run'/'spherical')[-1].name.removeprefix('step-'))
    result = call(*command, '--steps', step + 2)
    assert result.returncode == 0 and 'finetuned spherical' in result.stdout, result.stderr


def test_a_study_leaves_folders_that_diffusers_opens(tmp_path):
    train, test = digits_images('train')[0], digits_images('test')[0][:128]
    tokenizer = load_tokenizer('digits')
    tokenizer = standardise(tokenizer, measure_statistics(tokenizer, train.split(200)))
    result = finetune_study(tokenizer, train, tmp_path, FinetuneConfig(**QUICK), held_out=test, extractor='digits', progress=False)
    assert set(result['pipelines']) == {'original', 'original, projected', 'finetuned spherical', 'finetuned control'} and len(result['decoder_swap']) == 2
    assert result['protocol']['held_out'] == 128 and not result['protocol']['held_out_was_trained_on'] and result['protocol']['extractor'] == 'digits'
    for arm in ('spherical', 'control'):
        plain, t = AutoencoderKL.from_pretrained(tmp_path/arm/'tokenizer'), load_tokenizer(tmp_path/arm/'tokenizer')
        assert t.spherical == (arm == 'spherical') and t.latent_identity == tokenizer.latent_identity and t.transform.config == tokenizer.transform.config
        assert all(torch.equal(v, t.autoencoder.state_dict()[k]) for k, v in plain.state_dict().items())
        again = reconstruction_metrics(t, test)
        assert again['psnr'] == pytest.approx(result['pipelines'][f'finetuned {arm}']['psnr'], abs=1e-3)
    assert json.loads((tmp_path/'evaluation.json').read_text())['pipelines'] == result['pipelines'] and (tmp_path/'strip.png').exists()
    finetune_study(tokenizer, train, tmp_path, FinetuneConfig(**QUICK), held_out=test, extractor='none', progress=False)
    assert len(losses(tmp_path/'spherical')) == QUICK['steps'], 'a second call trains nothing again'


def test_images_that_cannot_be_read_give_way(tmp_path):
    from PIL import Image
    images, _ = digits_images('train')
    (tmp_path/'folder').mkdir()
    for n, x in enumerate(images[:40]): Image.fromarray(((x[0] + 1)*127.5).byte().numpy()).save(tmp_path/'folder'/f'{n:02d}.png')
    (tmp_path/'folder'/'07.png').write_text('not an image')
    trainer = DecoderTrainer(start(), ImageSource(tmp_path/'folder', 16), FinetuneConfig(**QUICK | {'batch_size': 20, 'steps': 4}), tmp_path/'run')
    trainer.fit(progress=False)
    assert trainer.feed.skipped == {7}
