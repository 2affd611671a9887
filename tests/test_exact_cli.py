"""Every option of the commands reaches what it sets, seen by recorders in place of the work."""
import functools
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import Recorder

from spherical_lfm import fidelity
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.experiments import PRESETS
from spherical_lfm.sampling import Sampler, load_run, sample
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli
from spherical_lfm.tools.studies import Analysis, Probing
from spherical_lfm.training import TrainConfig, Trainer


class Stop(Exception):
    "Ends a command where its work would begin."


def stop(_): raise Stop


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp('cli')
    encode_latents(load_tokenizer('digits'), ImageSource('digits'), root/'latents', Encoding(flip=False), order=torch.arange(40), progress=False)
    config = TrainConfig(model='SiT-Ti/2', steps=2, batch_size=8, checkpoint_every=1, log_every=1)
    Trainer(config, LatentDataset(root/'latents', project=project), root/'run').fit(progress=False)
    return SimpleNamespace(root=root, run=str(root/'run'), latents=str(root/'latents'))


def words(options: dict) -> list[str]:
    "Options as they are typed."
    return [w for k, v in options.items() for w in ((f'--{k}',) if v is True else (f'--{k}', str(v)))]


def test_options_of_training(place, monkeypatch, tmp_path):
    options = dict(model='SiT-Ti/4', steps=7, batch_size=12, lr=.003, warmup=5, ema_decay=.8, max_grad_norm=.7,
                   label_dropout=.2, prediction='data', skip=True, time_sampling='logit-normal', time_shift=2.,
                   coupling='transport', jacobi=True, precision='bf16', compile=True, accumulate=3, checkpointing=True,
                   parallel='fsdp', seed=4, log_every=3, checkpoint_every=6, keep=2)
    recorder = Recorder(monkeypatch, cli, 'Trainer', stop)
    with pytest.raises(Stop):
        cli.slfm_train([place.latents, str(tmp_path/'out'), '--arm', 'spherical-slerp', *words(options)])
    config = asdict(recorder.calls[0]['config'])
    assert {k: config[k] for k in options} == options and config['arm'] == 'spherical-slerp'
    with pytest.raises(Stop):
        cli.slfm_train([place.latents, str(tmp_path/'out'), '--arm', 'vanilla-shell', '--preset', 'digits', '--lr',
                        '.5'])
    given = recorder.calls[1]
    assert (given['config'].arm, given['config'].lr, given['config'].steps, given['config'].flip,
            given['data'].spherical) == ('vanilla-shell', .5, 1200, False, False)


def test_options_of_encoding(monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, cli, 'encode_latents', stop)
    options = dict(no_flip=True, dtype='bf16', precision='bf16', batch_size=9, shard_size=11, seed=5)
    with pytest.raises(Stop): cli.slfm_encode(['digits', 'digits', str(tmp_path/'out'), *words(options)])
    given = recorder.calls[0]
    assert given['encoding'] == Encoding(flip=False, dtype='bf16', precision='bf16', batch_size=9, shard_size=11, seed=5)
    assert given['order'] is None and not given['tokenizer'].spherical
    with pytest.raises(Stop): cli.slfm_encode(['digits', 'digits', str(tmp_path/'out')])
    assert recorder.calls[1]['encoding'] == Encoding()


def test_options_of_sampling(place, monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, cli, '_draw_numbered', stop)
    options = dict(count=13, steps=6, method='adams2', guidance=2.5, guide_from=.2, guide_to=.6, negative=3, shift=2.,
                   tolerance=.3, precision='bf16', step=1, seed=8, speeds='1.5,2')
    with pytest.raises(Stop): cli.slfm_sample([place.run, str(tmp_path/'out'), *words(options)])
    given = recorder.calls[0]
    assert given['sampler'] == Sampler(6, 'adams2', 2.5, (.2, .6), 3, 2., .3, 'bf16', 8, (1.5, 2.))
    assert given['numbers'] == range(13) and sorted(given['y'].bincount(minlength=10).tolist()) == [1]*7 + [2]*3
    with pytest.raises(Stop): cli.slfm_sample([place.run, str(tmp_path/'out'), '--count', '4', '--label', '6'])
    given = recorder.calls[1]
    assert given['y'].tolist() == [6]*4
    assert given['sampler'] == Sampler(50, 'euler', 1., (0., 1.), None, 1., 1e-2, 'float32', 0)


@pytest.mark.parametrize('given, steps', [([], 250), (['--method', 'heun'], 250), (['--method', 'flow_map'], 4), (['--method', 'flow_map', '--steps', '9'], 9)])
def test_steps_that_nobody_named(place, monkeypatch, tmp_path, given, steps):
    "A flow map takes few, whatever other methods take: an evaluation's usual 250 are shorter than any it has learned."
    recorder = Recorder(monkeypatch, cli, '_open_run', stop)
    with pytest.raises(Stop): cli.slfm_evaluate([place.run, 'digits', *given])
    assert recorder.calls[0]['sampler'].steps == steps
    recorder = Recorder(monkeypatch, cli, '_claim_samples', stop)
    monkeypatch.setattr(cli, 'sample', lambda *_: None)  # this run has no flow map
    with pytest.raises(Stop): cli.slfm_sample([place.run, str(tmp_path/'out'), *given])
    assert recorder.calls[0]['plan']['steps'] == (50 if steps == 250 else steps)
    chosen = [w.replace('--', '--sample_') for w in given]
    recorder = Recorder(monkeypatch, cli, 'compare', stop)
    with pytest.raises(Stop): cli.slfm_compare(['flux2-b2', '--tokenizer', 'digits', *chosen])
    assert recorder.calls[0]['preset'].sampler.steps == steps


def test_samples_on_disk_are_those_of_the_run(place, tmp_path):
    from torchvision.io import read_image

    from spherical_lfm.engine.images import to_uint8
    cli.slfm_sample([place.run, str(tmp_path/'out'), '--count', '12', '--steps', '3', '--seed', '5', '--step', '1'])
    files = sorted((tmp_path/'out').rglob('*.png'), key=lambda f: f.stem)
    model, path, _ = load_run(place.run, 1)
    y = torch.tensor([int(f.parent.name) for f in files])
    with torch.no_grad():
        want = to_uint8(load_tokenizer('digits', spherical=True).decode(sample(model, path, y, Sampler(3, seed=5))))
    assert len(files) == 12
    for f, x in zip(files, want): assert (read_image(str(f)).int() - x.int()).abs().max() <= 1
    cli.slfm_sample([place.run, str(tmp_path/'all'), *'--count 12 --steps 3 --seed 5 --step 1 --npz'.split()])
    with np.load(tmp_path/'all.npz') as z: images, labels = z['arr_0'], z['arr_1']
    assert labels.tolist() == y.tolist()
    assert np.abs(images.astype(int) - want.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1


def test_samples_are_shared_among_processes(monkeypatch):
    for rank, want in enumerate([[range(0, 250), range(500, 600)], [range(250, 500)]]):
        monkeypatch.setattr(cli, 'processes', lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=2))
        assert cli._pieces(600) == want


def test_interrupted_samples_go_on(place, monkeypatch, tmp_path):
    "Pieces that are there are not drawn again, and what was missing is what it would have been."
    drawn = Recorder(monkeypatch, cli, '_draw_numbered', lambda given: fidelity._draw_numbered(**given))
    monkeypatch.setattr(cli, '_pieces', lambda count: [range(k, k + 4) for k in range(0, count, 4)])
    def call(): cli.slfm_sample([place.run, str(tmp_path/'out'), *'--count 12 --steps 2 --seed 5'.split()])
    call()
    before = {f: f.read_bytes() for f in tmp_path.glob('out/*/*.png')}
    next(f for f in before if f.stem == '000005').unlink()
    call()
    assert [c['numbers'] for c in drawn.calls] == [range(0, 4), range(4, 8), range(8, 12), range(4, 8)]
    assert len(before) == 12 and all(f.read_bytes() == pixels for f, pixels in before.items())


def test_options_of_scoring_a_run(place, monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, cli, 'generate', stop)
    options = dict(count=23, steps=6, method='adams2', guidance=2.5, guide_from=.2, guide_to=.6, negative=3, shift=2.,
                   tolerance=.3, precision='bf16', step=1, save='png', seed=8, speeds='1.5,2')
    with pytest.raises(Stop):
        cli.slfm_evaluate([place.run, 'digits', '--extractor', 'digits', '--size', '16', *words(options)])
    given = recorder.calls[0]
    assert given['sampler'] == Sampler(6, 'adams2', 2.5, (.2, .6), 3, 2., .3, 'bf16', 8, (1.5, 2.))
    assert (given['save'], given['extractor'], given['run'].record['step']) == ('png', 'digits', 1)
    assert len(given['labels']) == 23
    assert given['tokenizer'].identity == load_tokenizer('digits', spherical=True).identity


def test_too_few_samples_are_not_drawn(place, monkeypatch):
    Recorder(monkeypatch, cli, 'generate', lambda _: pytest.fail('samples were drawn'))
    with pytest.raises(SystemExit, match='count must be at least 10, got 9'): cli.slfm_evaluate([place.run, 'digits', '--extractor', 'digits', '--count', '9'])


def test_options_of_a_comparison(monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, cli, 'compare', stop)
    options = dict(images='digits', split='test', arms='vanilla-shell,spherical-linear', out=str(tmp_path/'out'),
                   tokenizer='sd', control='taef2', steps=9, samples=77, no_curve=True, seed=3,
                   image_size=32, dtype='bf16', reference='adm.npz', reference_count=55, curve_samples=11,
                   guidances='1,2.5', sample_steps=13, sample_method='heun', sample_precision='bf16', lr=.5,
                   no_flip=True, compile=True, window=99, precision='bf16')
    with pytest.raises(Stop): cli.slfm_compare(['digits', *words(options)])
    given = recorder.calls[0]
    preset = given['preset']
    assert (preset.tokenizer, preset.control, preset.samples, preset.curve_samples) == ('sd', 'taef2', 77, 11)
    assert (preset.image_size, preset.dtype, preset.reference, preset.reference_count) == (32, 'bf16', 'adm.npz', 55)
    assert preset.guidances == (1, 2.5) and preset.sampler == Sampler(13, 'heun', precision='bf16')
    changed = dict(steps=9, lr=.5, flip=False, compile=True, window=99, precision='bf16')
    assert preset.train == PRESETS['digits'].train | changed
    assert (given['images'].source, given['images'].split) == ('digits', 'test')
    assert (given['arms'], given['seed'], given['curve']) == (('vanilla-shell', 'spherical-linear'), 3, False)
    with pytest.raises(Stop): cli.slfm_demo(['--arms', 'all', '--seed', '4', '--out', str(tmp_path/'out')])
    assert len(recorder.calls[1]['arms']) == 4 and recorder.calls[1]['seed'] == 4


def test_options_of_finetuning(monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch, cli, 'finetune_study', stop)
    options = dict(held_out='digits', held_out_count=21, size=16, arms='control', steps=8, batch_size=4, lr=.002,
                   perceptual='none', discriminator_start=3, precision='bf16',
                   extractor='digits', no_flip=True, seed=6, log_every=2, checkpoint_every=5)
    with pytest.raises(Stop): cli.slfm_finetune(['digits', 'digits', str(tmp_path/'out'), *words(options)])
    given = recorder.calls[0]
    config = asdict(given['config'])
    assert {k: config[k] for k in ('steps', 'batch_size', 'lr', 'perceptual', 'discriminator_start', 'precision',
                                   'seed', 'log_every', 'checkpoint_every')} == {
        k: options[k] for k in ('steps', 'batch_size', 'lr', 'perceptual', 'discriminator_start', 'precision', 'seed',
                                'log_every', 'checkpoint_every')}
    assert config['flip'] is False and tuple(given['arms']) == ('control',) and given['extractor'] == 'digits'
    test = digits_images('test')[0]
    gap = torch.cdist(given['held_out'].flatten(1), test.flatten(1)).min(1).values
    assert len(given['held_out']) == 21 and gap.max() < 1e-3, 'held-out images are test images'


def test_options_of_probing_and_analysing(monkeypatch, tmp_path):
    probe = Recorder(monkeypatch, cli, 'probe_study', stop)
    with pytest.raises(Stop):
        cli.slfm_probe(['digits', 'digits', *words(dict(out=str(tmp_path/'p'), size=16, count=30, neighbours='any',
                                                        distances='pixel', sensitivity_count=9, batch_size=5, seed=2))])
    given = probe.calls[0]
    assert given['probing'] == Probing(count=30, neighbours='any', sensitivity_count=9, batch_size=5, seed=2)
    assert list(given['distances'][0]) == ['pixel']
    analyze = Recorder(monkeypatch, cli, 'analyze_study', stop)
    with pytest.raises(Stop):
        cli.slfm_analyze(['digits', 'digits', *words(dict(out=str(tmp_path/'a'), size=16, count=30, name='mine',
                                                          statistics='measure', pack=2, hold=20, batch_size=5, seed=2))])
    given = analyze.calls[0]
    assert given['name'] == 'mine' and given['analysis'] == Analysis(30, 'measure', 2, 20, 5, 2)


def test_options_of_a_benchmark(monkeypatch):
    "Only what was given reaches the benchmark; the side of images follows the tokenizer."
    given = []
    for name in ('train', 'tokenizer', 'fidelity'):
        monkeypatch.setitem(cli._BENCHMARKS, name, functools.wraps(cli._BENCHMARKS[name])(lambda **taken: given.append(taken) or stop(taken)))
    for argv in (['train', '--model', 'SiT-B/2', '--side', '8', '--no_eager'], ['tokenizer', '--tokenizer', 'taef2', '--count', '9'],
                 ['fidelity', '--rounds', '2'], ['fidelity', '--size', '32']):
        with pytest.raises(Stop): cli.slfm_bench(argv)
    assert given == [dict(model='SiT-B/2', side=8, eager=False), dict(tokenizer='taef2', count=9, size=256),
                     dict(rounds=2, size=16), dict(size=32)]
