"""Nothing of the user's is removed or replaced: by any command, function or script, in refusal, success, failure, SIGKILL or resume."""
import inspect
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Command
from PIL import Image

from spherical_lfm import decoder, experiments, fidelity, tokenizers, training
from spherical_lfm.decoder import FinetuneConfig, finetune_decoder
from spherical_lfm.engine import features, files, images, latents, report, runs
from spherical_lfm.engine.files import MARK, atomic_write, claim, locked, read_manifest, write_json
from spherical_lfm.engine.images import ImageSource, digits_images, save_grid
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.runs import checkpoints
from spherical_lfm.engine.shards import ShardedJob
from spherical_lfm.experiments import PRESETS, compare, save_preset
from spherical_lfm.fidelity import Pieces, generate, measure_reference, save_reference
from spherical_lfm.sampling import Sampler, load_run
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli, studies
from spherical_lfm.tools.studies import (
    PREDICTIONS,
    Analysis,
    Probing,
    analyze_study,
    evolution_study,
    few_steps_study,
    finetune_study,
    prediction_study,
    probe_study,
    seeds_study,
    solver_study,
    speed_study,
)
from spherical_lfm.training import TrainConfig, Trainer

TINY = dict(model='SiT-Ti/4', steps=2, batch_size=8, log_every=1, ema_decay=.9)
QUICK = ['--steps', '2', '--batch_size', '4', '--perceptual', 'none', '--extractor', 'none', '--size', '16', '--log_every', '1', '--arms', 'spherical', '--no_flip']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Latents and a trained run for what needs them."
    root = tmp_path_factory.mktemp('outputs')
    encode_latents(load_tokenizer('digits'), ImageSource('digits', split='test'), root/'latents', Encoding(flip=False), progress=False)
    Trainer(TrainConfig(**TINY), LatentDataset(root/'latents', project=project), root/'run').fit(progress=False)
    return root


def strangers(folder: Path, elsewhere: Path):
    "What people have in their folders: files, hidden folders, names like ours, a link."
    for name in ('notes.txt', '.git/config', '.venv/bin/python', 'images/0001/holiday.jpg', 'images-backup/1.png', 'checkpoints/mine.txt', 'features-old.safetensors',
                 '.latents.partial/1.bin', '.step-00000001-abcdefgh/x', 'start-of-mine/config.txt', 'strips/old.png'):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(name.encode()*3)
    elsewhere.mkdir(exist_ok=True)
    (elsewhere/'kept').write_text('far away')
    (folder/'link').symlink_to(elsewhere)


def contents(folder: Path) -> dict:
    "Every file with its bytes, every link with its target."
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_symlink() or p.is_file()}


def survive(before: dict, folder: Path): assert before.items() <= contents(folder).items(), sorted(set(before) - set(contents(folder)))


def quiet(command, *args): command([*map(str, args)])


def make_features(out, place):
    generate(out, load_run(place/'run'), load_tokenizer('digits', spherical=True), torch.arange(12) % 10, 'digits', Sampler(1), 'png', Pieces(6, progress=False))


def small_preset(): return replace(PRESETS['digits'], train=PRESETS['digits'].train | TINY | {'checkpoint_every': 2}, samples=20, curve_samples=20, sampler=Sampler(1))


FOLDERS = { # what writes a folder: (out, place) -> work
    'slfm_encode': lambda out, place: quiet(cli.slfm_encode, 'digits', 'digits', out, '--no_flip', '--split', 'test'),
    'encode_latents': lambda out, place: encode_latents(load_tokenizer('digits'), ImageSource('digits', split='test'), out, Encoding(flip=False), progress=False),
    'slfm_train': lambda out, place: quiet(cli.slfm_train, place/'latents', out, '--model', 'SiT-Ti/4', '--steps', 2, '--batch_size', 8, '--log_every', 1),
    'Trainer': lambda out, place: Trainer(TrainConfig(**TINY), LatentDataset(place/'latents', project=project), out).fit(progress=False),
    'slfm_finetune': lambda out, place: quiet(cli.slfm_finetune, 'digits', 'digits', out, *QUICK),
    'finetune_study': lambda out, place: finetune_study(load_tokenizer('digits'), digits_images('test')[0][:20], out, FinetuneConfig(steps=1, batch_size=4, perceptual='none'), ('control',), extractor='none', progress=False),
    'finetune_decoder': lambda out, place: finetune_decoder(load_tokenizer('digits'), digits_images('test')[0][:20], FinetuneConfig(steps=1, batch_size=4, perceptual='none'), out, progress=False),
    'slfm_probe': lambda out, place: quiet(cli.slfm_probe, 'digits', 'digits', '--out', out, '--count', 30, '--sensitivity_count', 2, '--distances', 'pixel'),
    'probe_study': lambda out, place: probe_study(load_tokenizer('digits'), ImageSource('digits'), out, Probing(30, sensitivity_count=2), 'pixel', progress=False),
    'slfm_analyze': lambda out, place: quiet(cli.slfm_analyze, 'digits', 'digits', '--out', out, '--count', 40),
    'analyze_study': lambda out, place: analyze_study(load_tokenizer('digits'), ImageSource('digits'), out, analysis=Analysis(40), progress=False),
    'slfm_sample': lambda out, place: quiet(cli.slfm_sample, place/'run', out, '--count', 4, '--steps', 1),
    'generate': make_features,
    'measure_reference': lambda out, place: measure_reference(ImageSource('digits', split='test'), out, 'digits', progress=False),
    'compare': lambda out, place: compare(small_preset(), ('vanilla-linear',), out, 'digits', progress=False),
    'slfm_compare': lambda out, place: quiet(cli.slfm_compare, 'digits', '--out', out, '--arms', 'vanilla-linear', '--steps', 2, '--samples', 20, '--no_curve'),
    'slfm_demo': lambda out, place: quiet(cli.slfm_demo, '--out', out),
    'prediction_study': lambda out, place: prediction_study(place/'predictions.json', out, (0,), .002, PREDICTIONS[:1], progress=False),
    'few_steps_study': lambda out, place: few_steps_study(place/'few.json', out, (0,), .002, ('velocity',), (1,), progress=False),
    'speed_study': lambda out, place: speed_study(place/'speeds.json', out, (0,), .002, PREDICTIONS[:1], progress=False),
}
LONG = ('slfm_demo', 'slfm_compare', 'slfm_probe', 'slfm_finetune', 'slfm_analyze', 'slfm_encode', 'slfm_train') # functions stand for them where it takes long


@pytest.mark.parametrize('name', FOLDERS)
def test_a_strangers_folder_is_refused(name, place, tmp_path):
    folder = tmp_path/'mine'
    strangers(folder, tmp_path/'elsewhere')
    before, far = contents(folder), contents(tmp_path/'elsewhere')
    with pytest.raises((FileExistsError, SystemExit), match='choose another'): FOLDERS[name](folder, place)
    assert contents(folder) == before and contents(tmp_path/'elsewhere') == far
    (tmp_path/'file').write_text('mine')
    with pytest.raises((FileExistsError, SystemExit), match='is a file, and a folder is wanted'): FOLDERS[name](tmp_path/'file', place)
    assert (tmp_path/'file').read_text() == 'mine' and {p.name for p in tmp_path.iterdir()} == {'mine', 'elsewhere', 'file'}


@pytest.mark.parametrize('name', [n for n in FOLDERS if n not in LONG])
def test_strangers_in_a_folder_of_ours_survive(name, place, tmp_path, monkeypatch):
    "Success through a link, a second call, and a disk that fills up in the third."
    (tmp_path/'there').mkdir()
    (tmp_path/'out').symlink_to(tmp_path/'there')
    FOLDERS[name](tmp_path/'out', place)
    assert (tmp_path/'out').is_symlink() and read_manifest(tmp_path/'there')['made_by'] == 'spherical_lfm'
    strangers(tmp_path/'there', tmp_path/'elsewhere')
    before = {k: v for k, v in contents(tmp_path/'there').items() if (tmp_path/'there'/k).is_symlink() or k.encode()*3 == v}
    assert len(before) == 12
    FOLDERS[name](tmp_path/'out', place)
    survive(before, tmp_path/'there')
    def full(path): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files, '_flush', full)
    try: FOLDERS[name](tmp_path/'out', place)
    except (OSError, SystemExit) as e: assert 'cannot write' in str(e)
    survive(before, tmp_path/'there')
    assert not list((tmp_path/'there').rglob(f'{MARK}*')) and (tmp_path/'elsewhere'/'kept').exists()


KILLED = {'slfm_encode': ('latents', ['digits', 'digits', '{}/out', '--shard_size', '20', '--batch_size', '4', '--no_flip'], 'latents-*.safetensors'),
          'slfm_train': ('a run', ['{}/latents', '{}/out', '--model', 'SiT-Ti/4', '--steps', '400', '--batch_size', '4', '--log_every', '1', '--checkpoint_every', '2', '--keep', '2'], 'checkpoints/step-*'),
          'slfm_finetune': ('finetuning', ['digits', 'digits', '{}/out', *QUICK[2:], '--steps', '30', '--checkpoint_every', '2'], 'spherical/checkpoints/step-*'),
          'slfm_sample': ('samples', ['{}/run', '{}/out', '--count', '300', '--steps', '1'], '*/0*.png')}


def made(folder: Path, sign: str) -> list[Path]:
    "What has such a name so far; a folder may go while it is looked at."
    try: return list(folder.glob(sign))
    except FileNotFoundError: return []


@pytest.mark.parametrize('name', KILLED)
def test_kill_9_and_resume_leave_strangers_alone(name, place, tmp_path):
    purpose, args, sign = KILLED[name]
    for link in ('latents', 'run'): (tmp_path/link).symlink_to(place/link)
    if name != 'slfm_sample': strangers(claim(tmp_path/'out', purpose), tmp_path/'elsewhere') # the manifest of samples says more
    before = {k: v for k, v in contents(tmp_path/'out').items() if k != 'slfm.json'}
    line = [a.format(tmp_path) for a in args]
    process = Command(name, *line)
    deadline = time.monotonic() + 60
    while not made(tmp_path/'out', sign) and time.monotonic() < deadline: time.sleep(.01)
    time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path/'out').glob(sign))
    survive(before, tmp_path/'out')
    if name == 'slfm_sample':
        strangers(tmp_path/'out', tmp_path/'elsewhere')
        before = {k: v for k, v in contents(tmp_path/'out').items() if not re.match(r'\d{4}/|slfm.json', k)}
    if name == 'slfm_train': line[line.index('--steps') + 1] = str(int(checkpoints(tmp_path/'out')[-1].name[5:]) + 2)
    result = Command(name, *line).wait()
    assert result.returncode == 0, result.stderr
    survive(before, tmp_path/'out')
    assert not list((tmp_path/'out').rglob(f'{MARK}*'))
    if name == 'slfm_sample': assert len(list((tmp_path/'out').glob('0*/0*.png'))) == 300


FILES = { # what writes a file: suffix, (path, place) -> work
    'slfm_evaluate --out': ('.json', lambda path, place: quiet(cli.slfm_evaluate, 'digits', 'digits', '--extractor', 'digits', '--size', 16, '--out', path)),
    'slfm_evaluate --save_reference_to': ('.npz', lambda path, place: quiet(cli.slfm_evaluate, 'digits', 'digits', '--extractor', 'digits', '--size', 16, '--save_reference_to', path)),
    'slfm_bench --out': ('.json', lambda path, place: quiet(cli.slfm_bench, 'fidelity', '--rounds', 1, '--count', 20, '--out', path)),
    'slfm_sample --npz': ('.npz', lambda path, place: quiet(cli.slfm_sample, place/'run', path.with_suffix(''), '--count', 3, '--steps', 1, '--npz')),
    'slfm_sample grid': ('.png', lambda path, place: quiet(cli.slfm_sample, place/'run', path.parent/path.stem.removesuffix('-grid'), '--count', 3, '--steps', 1)),
    'save_grid': ('.png', lambda path, place: save_grid(torch.zeros(2, 3, 8, 8), path)),
    'save_preset': ('.yaml', lambda path, place: save_preset(PRESETS['digits'], path)),
    'save_reference': ('.npz', lambda path, place: save_reference({'features': torch.randn(20, 4)}, path)),
    'seeds_study': ('.json', lambda path, place: seeds_study(path)),
    'prediction_study': ('.json', lambda path, place: prediction_study(path, place/'predictions')),
    'solver_study': ('.json', lambda path, place: solver_study(path)),
    'few_steps_study': ('.json', lambda path, place: few_steps_study(path, place/'few')),
    'speed_study': ('.json', lambda path, place: speed_study(path, place/'predictions')),
    'evolution_study': ('.png', lambda path, place: evolution_study(path)),
}


@pytest.mark.parametrize('name', FILES)
def test_a_strangers_file_is_refused_and_ours_is_replaced(name, place, tmp_path):
    suffix, work = FILES[name]
    path = tmp_path/f'x-grid{suffix}'
    if suffix in ('.json', '.yaml'): path.write_text('{"mine": 1}')
    elif suffix == '.npz': np.savez(path, mine=1)
    else: Image.new('RGB', (4, 4)).save(path)
    before = contents(tmp_path)
    with pytest.raises((FileExistsError, SystemExit), match='was not made by this program'): work(path, place)
    assert contents(tmp_path) == before
    path.unlink()
    path.mkdir()
    (path/'mine').write_text('x')
    with pytest.raises((FileExistsError, SystemExit), match='is a folder, and a file is wanted'): work(path, place)
    assert contents(path) == {'mine': b'x'}
    if name.endswith('study'): return
    (path/'mine').unlink(), path.rmdir()
    for _ in range(2): work(path, place)
    assert path.is_file()


def test_scripts_refuse_a_strangers_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent/'scripts'))
    import gpu_run
    import make_data
    import study_taef2
    (tmp_path/'results').mkdir()
    for name in ('digits_comparison.json', 'digits_prediction.json', 'digits_speed.json', 'digits_few_steps.json', 'digits_solvers.json', 'digits_evolution.json', 'geometry.json', 'gpu_tests.json'): (tmp_path/'results'/name).write_text('{"mine": 1}')
    write_json(tmp_path/'new.json', {'environment': {}})
    before = contents(tmp_path)
    works = [lambda: make_data.results(tmp_path, .01), lambda: make_data.prediction(tmp_path, .01), lambda: make_data.speed(tmp_path, .01), lambda: make_data.few_steps(tmp_path, .01), lambda: make_data.solvers(tmp_path, .01), lambda: make_data.evolution(tmp_path, .01),
             lambda: study_taef2.keep(tmp_path/'results', geometry=tmp_path/'new.json'), lambda: gpu_run.store(SimpleNamespace(out=tmp_path/'results', commit=''), 'gpu_tests.json', {})]
    for work in works:
        with pytest.raises(FileExistsError, match='was not made by this program'): work()
    assert contents(tmp_path) == before


@pytest.mark.parametrize('out', ['{}', '{}/..', '{}/sub', '{}/a'])
@pytest.mark.parametrize('name', ['slfm_encode', 'slfm_analyze', 'slfm_probe', 'slfm_finetune', 'slfm_compare'])
def test_images_and_output_lie_apart(name, out, tmp_path):
    pics = tmp_path/'home'/'pics'
    for n in range(4):
        (pics/'ab'[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (n*60, 0, 0)).save(pics/'ab'[n % 2]/f'{n}.png')
    before, target = contents(tmp_path), out.format(pics)
    args = {'slfm_encode': ['digits', pics, target], 'slfm_finetune': ['digits', pics, target, *QUICK], 'slfm_compare': ['digits', '--images', pics, '--out', target]}
    with pytest.raises(SystemExit, match='choose another'): quiet(getattr(cli, name), *args.get(name, ['digits', pics, '--out', target]), *([] if name == 'slfm_compare' or name == 'slfm_finetune' else ['--size', 16]))
    assert contents(tmp_path) == before


def test_saving_a_tokenizer_adds_to_a_folder(tmp_path):
    strangers(tmp_path/'t', tmp_path/'elsewhere')
    before = contents(tmp_path/'t')
    for _ in range(2): load_tokenizer('digits').save_pretrained(tmp_path/'t')
    survive(before, tmp_path/'t')
    assert load_tokenizer(tmp_path/'t').identity == load_tokenizer('digits').identity
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'config.json').write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(FileExistsError, match='holds another model'): load_tokenizer('digits').save_pretrained(tmp_path/'other')
    with pytest.raises(OSError, match='a file is there'): load_tokenizer('digits').save_pretrained(tmp_path/'other'/'config.json')
    assert contents(tmp_path/'other') == {'config.json': b'{"_class_name": "UNet2DModel"}'}


def test_files_and_folders_do_not_take_each_others_place(tmp_path):
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'mine').write_text('x')
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError, match='a folder is there'): write_json(tmp_path/'folder', {})
    with pytest.raises(OSError, match='a file is there'):
        with atomic_write(tmp_path/'file', folder=True): raise AssertionError('work was done')
    with pytest.raises(OSError, match='not empty'):
        with atomic_write(tmp_path/'folder', folder=True): raise AssertionError('work was done')
    (tmp_path/'link').symlink_to(tmp_path/'far.json')
    write_json(tmp_path/'link', {'a': 1})
    assert (tmp_path/'link').is_symlink() and json.loads((tmp_path/'far.json').read_text()) == {'a': 1}
    os.chmod(tmp_path/'far.json', 0o600)
    assert {p.name for p in tmp_path.iterdir()} == {'folder', 'file', 'link', 'far.json'} and contents(tmp_path/'folder') == {'mine': b'x'}


def test_a_second_writer_is_refused(place, tmp_path):
    "Two encodings into one cache: the second ends with a sentence, the first with all its images."
    line = ['digits', 'digits', tmp_path/'out', '--shard_size', '100', '--no_flip']
    first = Command('slfm_encode', *line)
    while not list((tmp_path/'out').glob('latents-*.safetensors')): time.sleep(.01)
    second = Command('slfm_encode', *line).wait()
    assert first.wait().returncode == 0
    assert second.returncode == 0 or 'another process is writing to' in second.stderr
    assert LatentDataset(tmp_path/'out', verify=True).index['count'] == 1438
    before = contents(tmp_path/'out')
    with locked(tmp_path/'out'), pytest.raises(SystemExit, match='another process is writing to'): FOLDERS['slfm_encode'](tmp_path/'out', place)
    assert contents(tmp_path/'out') == before
    claim(tmp_path/'run', 'a run')
    with locked(tmp_path/'run'), pytest.raises(SystemExit, match='another process is writing to'): FOLDERS['slfm_train'](tmp_path/'run', place)


def test_shards_that_are_not_to_be_seen_yet(tmp_path, monkeypatch):
    "On a network drive a note of another process may come late: no index is written of a part."
    note = ShardedJob.note
    monkeypatch.setattr(ShardedJob, 'note', lambda job, k: None if k == 1 else note(job, k))
    with pytest.raises(OSError, match='3 of 4 shards are to be seen'): encode_latents(load_tokenizer('digits'), ImageSource('digits', split='test'), tmp_path/'z', Encoding(flip=False, shard_size=100), progress=False)
    assert not (tmp_path/'z'/'index.json').exists()


def test_samples_of_two_settings_do_not_mix(place, tmp_path):
    sample = lambda *more: quiet(cli.slfm_sample, place/'run', tmp_path/'s', '--count', 4, '--steps', 1, *more)
    sample()
    before = contents(tmp_path)
    for more in (['--seed', 1], ['--guidance', 2], ['--count', 5], ['--weights', 'raw']):
        with pytest.raises(SystemExit, match=r'holds other samples \(they differ in'): sample(*more)
        assert contents(tmp_path) == before
    sample()
    assert len(list((tmp_path/'s').glob('0*/*.png'))) == 4


def test_every_writer_is_in_the_tables():
    "A new command or function with a place to write to has to be added above."
    commands = {n for n in vars(cli) if n.startswith('slfm_')}
    assert commands <= {n.split()[0] for n in (*FOLDERS, *FILES)}
    written = {'atomic_write', 'write_json', 'claim', 'claim_file', 'locked', 'remove_listed', 'save_figure', 'save_grid', 'read_manifest', 'save_npz', # the writers themselves, and what they consist of
               'remove_features', 'apart_from', 'seal', 'run_arm', 'prepare_latents', 'prepare_reference', 'report_html', 'starting_tokenizer'} # called by `compare`, `score` and the studies
    for module in (files, images, latents, runs, features, report, tokenizers, decoder, training, fidelity, experiments, studies):
        for name in set(module.__all__) - written - set(FOLDERS) - set(FILES):
            thing = getattr(module, name)
            if not inspect.isfunction(thing) or thing.__module__ != module.__name__: continue
            assert not re.search(r'atomic_write|write_json|save_figure|claim\(', inspect.getsource(thing)), f'{name} writes, and no case above tries it'
