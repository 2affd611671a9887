"""Statistics of real images at ImageNet's size, presets as files, and who decides what is kept."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import Recorder, noise

from spherical_lfm import experiments as ex
from spherical_lfm import fidelity
from spherical_lfm.engine import shards
from spherical_lfm.engine.features import extract_features
from spherical_lfm.engine.files import claim
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.shards import ShardedJob
from spherical_lfm.fidelity import SUBSET, GaussianMoments, measure_reference, save_reference, score_features

DIGITS = ImageSource('digits')


# --- moments ---

@pytest.mark.parametrize('sizes', [(300,), (1, 299), (100, 100, 100), (7, 250, 43)])
def test_parts_have_the_moments_of_the_whole(sizes):
    rows = noise(300, 5, seed=1)*torch.tensor([1., 2., .1, 30., 1e-3]) + torch.tensor([0., 100., 0., -7., 1.])
    whole, merged = GaussianMoments(5), GaussianMoments(5)
    for part in rows.split(sizes):
        whole.update(part)
        some = GaussianMoments(5).update(part)
        merged.merge(some.count, some.mean, some.square)
    x = rows.double().numpy()
    for found in (whole, merged):
        assert found.count == 300
        np.testing.assert_allclose(found.statistics['mu'], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.statistics['sigma'], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_a_reference_in_shards_is_that_of_all_features(tmp_path):
    found = measure_reference(DIGITS, tmp_path/'r', 'digits', shard=300, progress=False)
    features = extract_features(digits_images('train')[0], 'digits')
    assert found['count'] == 1438
    np.testing.assert_allclose(found['sigma'], np.cov(features.double().numpy(), rowvar=False), atol=1e-5)
    torch.testing.assert_close(found['features'], features[DIGITS.shuffled(0)], atol=1e-4, rtol=1e-4)
    drawn = {'features': features[:200] + .1}
    direct, stored = (score_features(drawn, x, extractor='digits') for x in ({'features': features}, found))
    assert stored.keys() == direct.keys() and stored['fd'] == pytest.approx(direct['fd'], rel=1e-6)


def test_an_interrupted_reference_goes_on(tmp_path, monkeypatch):
    "Whole shards are kept, nothing is read twice, and the finished file is found again without a look at the images."
    made = []
    measure = fidelity._measure_shard

    def noted(job, k, found):
        made.append(k)
        if made == [0, 1, 2]: raise OSError('no space left')
        measure(job, k, found)
    monkeypatch.setattr(fidelity, '_measure_shard', noted)
    def call(): return measure_reference(DIGITS, tmp_path/'r', 'digits', shard=300, progress=False)
    with pytest.raises(OSError, match='no space left'): call()
    call()
    assert made == [0, 1, 2, 2, 3, 4]
    call()
    assert len(made) == 6
    assert sorted(f.suffix for f in (tmp_path/'r').iterdir() if f.name[0] != '.') == ['.json', '.npz']


def test_shards_of_another_size_are_not_taken_for_these(tmp_path, monkeypatch):
    "Interrupted after a shard of 300, begun again in shards of 500: every image counts once."
    def stop(job, notes, path): raise OSError('no space left')
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, '_merge_shards', stop)
        with pytest.raises(OSError, match='no space left'): measure_reference(DIGITS, tmp_path/'r', 'digits', shard=300, progress=False)
    found = measure_reference(DIGITS, tmp_path/'r', 'digits', shard=500, progress=False)
    want = extract_features(digits_images('train')[0], 'digits').double().mean(0)
    assert found['count'] == 1438
    np.testing.assert_allclose(found['mu'], want, atol=1e-5)


def test_a_hole_in_the_middle_is_seen(tmp_path):
    job = ShardedJob(claim(tmp_path/'out', 'numbers'), 'numbers', {}, 40, 10)
    for k in (0, 2, 3): job.write(k, {'x': torch.zeros(10)})
    with pytest.raises(OSError, match='3 of 4 shards are to be seen'): job.notes()


def test_missing_shards_are_shared_evenly(tmp_path, monkeypatch):
    "Of seven shards two are there: nobody waits for more than one shard of another process."
    def job(): return ShardedJob(claim(tmp_path/'out', 'numbers'), 'numbers', {}, 70, 10)
    for k in (0, 3): job().write(k, {'x': torch.zeros(10)})
    mine = []
    for rank in (0, 1):
        monkeypatch.setattr(shards, 'processes', lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=2))
        mine.append(job().mine)
    assert mine == [[1, 4, 6], [2, 5]]


MEMORY = '''
import sys, types, torch
from spherical_lfm import fidelity
def peak(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))//1024
def extract(images): return {'features': torch.rand(len(images), 1280), 'spatial': torch.rand(len(images), 4)}
fidelity.feature_function = lambda *_: extract
pixel = torch.zeros(3, 1, 1)
def source(n):
    return types.SimpleNamespace(fingerprint=str(n), skipped=[], shuffled=lambda seed: torch.arange(n),
                                 stream=lambda numbers: ((pixel, 0) for _ in numbers))
def run(n): fidelity.measure_reference(source(n), sys.argv[1] + str(n), 'efficientnet', shard=2048, progress=False)
fidelity.SUBSET = 1000
run(4096); before = peak(); run(40_960)
print(peak() - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_reference(tmp_path):
    "40,960 features of EfficientNet are 210 MB, 420 in double precision; a shard of them is 10."
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': '65536'} # large blocks go back at once: what the allocator keeps differs by 100 MB from run to run
    found = subprocess.run([sys.executable, '-c', MEMORY, str(tmp_path/'r')], capture_output=True, text=True, timeout=300, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    assert int(found.stdout) < 60


def test_kid_precision_and_recall_look_at_a_fixed_choice():
    "Their cost grows with the product of the counts: 50,000 by 1,281,167 distances do not fit anywhere."
    rows = torch.arange(SUBSET + 5000).float()[:, None]
    some = fidelity._subset(rows)
    assert len(some) == SUBSET and len(some.unique()) == SUBSET and torch.equal(some, fidelity._subset(rows))
    assert some.mean() == pytest.approx((SUBSET + 4999)/2, rel=.02), 'not the beginning'
    assert torch.equal(fidelity._subset(rows[:SUBSET]), rows[:SUBSET])


def test_a_protocol_says_how_many_were_looked_at():
    reference = {'mu': np.zeros(64), 'sigma': np.eye(64), 'count': 1_281_167, 'features': torch.zeros(SUBSET, 64)}
    told = fidelity.protocol_of('digits', 50_000, 'imagenet', reference)
    assert told['reference_count'] == 1_281_167 and told['subset'] == [SUBSET, SUBSET]
    assert fidelity.protocol_of('digits', 50_000, 'adm', {k: v for k, v in reference.items() if k != 'features'})['subset'] is None


# --- presets ---

def test_a_preset_takes_its_reference_from_a_file(tmp_path, monkeypatch):
    save_reference({'features': noise(40, 64)}, tmp_path/'adm.npz')
    monkeypatch.setattr(ex, 'measure_reference', lambda *_, **__: pytest.fail('the images were read'))
    found = ex.prepare_reference(replace(ex.PRESETS['digits'], reference=str(tmp_path/'adm.npz')), DIGITS, tmp_path)
    assert found['count'] == 40 and found['name'] == 'adm.npz' and found['content']


@pytest.mark.parametrize('name', list(ex.PRESETS))
def test_a_preset_is_a_file_and_back(tmp_path, name):
    ex.save_preset(ex.PRESETS[name], tmp_path/'p.yaml')
    assert ex.get_preset(tmp_path/'p.yaml') == ex.PRESETS[name]


@pytest.mark.parametrize('text,message', [
    ('tokenizer: [', 'is no YAML'), ('3', 'is no mapping'), ('steps: 3', 'has no steps: choose from'),
    ('train: {rate: 3}', 'train of .* has no rate: choose from'), ('train: 3', 'train of .* is no mapping'),
    ('sampler: {stps: 3}', 'sampler of .* has no stps'), ('tokenizer: a', 'has no image_size'),
    ('{tokenizer: a, image_size: 16, train: {}, guidances: 3}', 'a value of the wrong kind'),
    ('{tokenizer: a, image_size: 16, train: {steps: many}}', 'steps|a value of the wrong kind'),
])
def test_a_preset_with_a_mistake(tmp_path, text, message):
    (tmp_path/'p.yaml').write_text(text)
    with pytest.raises(ValueError, match=message): ex.get_preset(tmp_path/'p.yaml')


@pytest.mark.parametrize('change,message', [
    (dict(train={'lr': -1.}), 'lr must be'), (dict(train={'model': 'SiT-Q/2'}), 'SiT-Q/2'), (dict(train={'jacobi': True}), 'the Jacobi weight belongs to slerp'),
    (dict(dtype='fp16'), 'dtype must be float32 or bf16'), (dict(extractor='clip'), 'unknown extractor'), (dict(reference='none.npz'), 'no .npz file at none.npz'),
    (dict(samples=9), 'samples must be at least 10, got 9'), (dict(curve_samples=4), 'curve_samples must be at least 10'),
])
def test_what_would_fail_late_is_refused_before_an_image_is_encoded(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(ex, 'prepare_latents', lambda *_: pytest.fail('images were encoded'))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ex.compare(replace(ex.PRESETS['digits'], **change), out=tmp_path/'out', progress=False)


@pytest.mark.parametrize('able', [True, False])
def test_bf16_only_where_it_is_native(monkeypatch, able):
    "Emulated bf16 is several times slower than float32."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx2': True, 'avx512_bf16': able})
    preset = ex.get_preset('flux2-b2')
    assert {preset.train['precision'], preset.sampler.precision} == {'bf16' if able else 'float32'}
    assert preset.dtype == 'bf16', 'on disk it costs nothing'


def test_latents_of_a_preset_are_stored_as_it_says(monkeypatch, tmp_path):
    encode = Recorder(monkeypatch, ex, 'encode_latents', lambda _: None)
    ex.prepare_latents(replace(ex.PRESETS['digits'], dtype='bf16'), DIGITS, tmp_path/'latents', progress=False)
    assert encode.calls[0]['encoding'].dtype == 'bf16'


def test_a_decoder_that_never_saw_projected_tokens_is_named():
    with pytest.warns(UserWarning, match='never saw projected tokens: run slfm_finetune'):
        ex._warn_of_decoder(replace(ex.PRESETS['digits'], tokenizer='digits-control'), ('spherical-slerp',))


@pytest.mark.parametrize('tokenizer,arms', [('digits', ('spherical-slerp',)), ('digits-control', ('vanilla-linear',))])
def test_nothing_is_said_of_a_decoder_that_did_or_need_not(recwarn, tokenizer, arms):
    ex._warn_of_decoder(replace(ex.PRESETS['digits'], tokenizer=tokenizer), arms)
    assert not recwarn.list


# --- one process decides ---

class _Two:
    "The second of two processes: the main one has said its word."
    is_main_process, process_index, num_processes = False, 1, 2

    def wait_for_everyone(self): pass


def test_what_is_kept_is_what_the_main_process_says(monkeypatch, tmp_path):
    "A file that this process sees and the main one does not, on a slow network drive, is not used."
    from spherical_lfm.engine import processes
    (tmp_path/'evaluation.json').write_text('{"preset": {}, "final": {"1.0": 3}, "curve": {}}')
    monkeypatch.setattr(processes, 'processes', _Two)
    monkeypatch.setattr(processes, 'told_by_main', lambda _: {})
    assert ex._kept_scores(Path(tmp_path), {})['final'] == {}
