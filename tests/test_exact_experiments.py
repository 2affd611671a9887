"""What a comparison hands on, seen by a recorder in place of the sampler, and what it makes of the answers."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import Recorder, blocks, noise

from spherical_lfm import experiments as ex
from spherical_lfm.concentration import norm_stats, path_norms, radial_share
from spherical_lfm.engine.features import extract_features, frechet_distance, psnr
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset
from spherical_lfm.paths import ARMS, SlerpPath
from spherical_lfm.sampling import Sampler, initial_noise, load_run, sample, trajectory, velocity_field
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import studies
from spherical_lfm.training import TrainConfig, Trainer

TINY = replace(ex.PRESETS['digits'], train=dict(model='SiT-Ti/2', steps=2, batch_size=8, lr=.1, checkpoint_every=1,
                                                log_every=1, ema_decay=.5, flip=False),
               sampler=Sampler(7, 'heun', interval=(.2, .7)), guidances=(1., 2.5), samples=40, curve_samples=20)


def pick(figures: dict, *names: str):
    "A figure under any of its names: a Fréchet distance is called FID with Inception alone."
    return next(figures[n] for n in names if n in figures)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Latents, a reference and a run of two steps for two arms."
    root = tmp_path_factory.mktemp('experiments')
    source = ImageSource('digits')
    ex.prepare_latents(TINY, source, root/'latents', progress=False)
    reference = ex.prepare_reference(TINY, source, root, progress=False)
    for arm in ('spherical-slerp', 'vanilla-linear'):
        data = LatentDataset(root/'latents', project=ARMS[arm].projection)
        Trainer(TrainConfig(arm=arm, **TINY.train), data, root/arm).fit(progress=False)
    return SimpleNamespace(root=root, reference=reference, labels=LatentDataset(root/'latents').y)


def answer(given):
    "Features and logits that depend on the number of the sample alone."
    given['out'].mkdir(parents=True, exist_ok=True)
    y = given['labels']
    logits = F.one_hot((y + (torch.arange(len(y)) % 4 == 0)) % 10, 10).float()
    return {'features': noise(len(y), 64, seed=9), 'logits': logits, 'y': y}


def test_the_reference_is_every_real_image(place):
    images, labels = digits_images('train')
    want = extract_features(images, 'digits').double()
    np.testing.assert_allclose(place.reference['mu'], want.mean(0), atol=1e-5)
    np.testing.assert_allclose(place.reference['sigma'], want.T.cov(), atol=1e-4)
    assert place.reference['features'].shape == (1438, 64) and place.reference['count'] == 1438 and torch.equal(place.labels.bincount(), labels.bincount())


@pytest.mark.parametrize('arm,decoder,exponential,wanted', [
    ('spherical-slerp', None, True, ('digits', True)), ('spherical-slerp', None, False, ('digits', True)),
    ('vanilla-linear', None, True, ('digits-control', False)), ('vanilla-linear', 'digits', True, ('digits', True)),
    ('spherical-slerp', 'digits-control', True, ('digits-control', True)),
])
def test_score_samples_what_was_asked_for(place, monkeypatch, arm, decoder, exponential, wanted):
    recorder = Recorder(monkeypatch, ex, 'generate', answer)
    run, sampler = load_run(place.root/arm, 1), replace(TINY.sampler, guidance=2.5, seed=11)
    if not exponential: run = run._replace(path=SlerpPath(exponential=False))
    y = ex.class_mixture(place.labels, 50)
    figures = ex.score(place.root/arm, run, TINY, place.reference, y, sampler, decoder, progress=False)
    given, = recorder.calls
    assert given['sampler'] == Sampler(7, 'heun', 2.5, (.2, .7), seed=11) and given['extractor'] == 'digits'
    assert repr(given['run'].path) == (f'SlerpPath(project_velocity=True, exponential={exponential})'
                                   if arm == 'spherical-slerp' else 'LinearPath(spherical=False)')
    model, other = load_run(place.root/arm, 1)[0].state_dict(), load_run(place.root/arm, 2)[0].state_dict()
    found = given['run'].model.state_dict()
    assert all(torch.equal(found[k], model[k]) for k in model)
    assert any(not torch.equal(found[k], other[k]) for k in other)
    assert given['tokenizer'].identity == load_tokenizer(wanted[0], spherical=wanted[1]).identity
    drawn = answer(given)
    assert pick(figures, 'fid', 'fd') == pytest.approx(frechet_distance(drawn['features'], place.reference['features']),
                                                       rel=1e-4)
    right = (drawn['logits'].argmax(1) == given['labels']).float().mean().item()
    assert figures['accuracy'] == pytest.approx(right) and right < 1
    told = figures['protocol']
    assert (told['guidance'], told['exponential'], told['solver'], told['solver_steps'], told['seed'],
            told['samples']) == (2.5, exponential, 'heun', 7, 11, 50)
    assert {'kid', 'is', 'precision', 'recall'} <= set(figures)


@pytest.mark.parametrize('count', [50, 1438, 2876])
def test_samples_have_the_mixture_of_the_data(count):
    labels = torch.cat([torch.zeros(1000, dtype=torch.long), torch.arange(438) % 10])
    y = ex.class_mixture(labels, count)
    want = labels.bincount(minlength=10).double()*count/len(labels)
    assert len(y) == count and (y.bincount(minlength=10) - want).abs().max() < 2
    assert len(y[:40].unique()) > 5, 'a picture or a batch has many classes'


@pytest.mark.parametrize('arm', ['spherical-slerp', 'spherical-linear', 'vanilla-shell'])
def test_an_arm_is_scored_at_every_guidance_and_checkpoint(place, monkeypatch, tmp_path, arm):
    def verdict(given):
        w = given['sampler'].guidance
        value = given['run'].record['step'] + 10*w + len(given['labels'])
        return {'fid': value, 'fd': value, 'kid': .5, 'accuracy': w/10, 'protocol': {'guidance': w}}
    recorder, trained = Recorder(monkeypatch, ex, 'score', verdict), []
    monkeypatch.setattr(ex, '_overview', lambda *_: None)
    fit = Trainer.fit

    def noted(self, *args, **kwargs):
        trained.append((self.config, self.data.spherical))
        return fit(self, *args, **kwargs)
    monkeypatch.setattr(Trainer, 'fit', noted)
    row = ex.run_arm(TINY, arm, place.root/'latents', place.reference, tmp_path/'run', 5, progress=False)
    config, spherical = trained[0]
    assert (config.arm, config.seed, config.steps, config.lr, spherical) == (arm, 5, 2, .1, arm.startswith('spherical'))
    asked = [(c['run'].record['step'], c['sampler'].guidance, len(c['labels']), c['preset'].metrics)
             for c in recorder.calls]
    every = TINY.metrics
    assert sorted(asked) == sorted([(2, 1., 40, every), (2, 2.5, 40, every), (1, 1., 20, ('fid',)), (2, 1., 20, ('fid',))])
    for c in recorder.calls:
        assert c['sampler'] == replace(TINY.sampler, guidance=c['sampler'].guidance, seed=5) and c['decoder'] is None
        assert repr(c['run'].path) == repr(ARMS[arm]) and c['reference'] is place.reference
        assert torch.equal(c['labels'], ex.class_mixture(place.labels, len(c['labels'])))
    assert pick(row, 'fid', 'fd') == 52 and row['accuracy'] == .1 and row['steps'] == 2
    assert [(g['guidance'], pick(g, 'fid', 'fd')) for g in row['guided']] == [(1., 52), (2.5, 67)]
    assert sorted((p['step'], pick(p, 'fid', 'fd')) for p in row['curve']) == [(1, 31), (2, 32)]
    log = [json.loads(line) for line in (tmp_path/'run'/'log.jsonl').read_text().splitlines()]
    assert row['final_loss'] == log[-1]['loss']
    assert row['loss_over_power'] == log[-1]['loss_over_power'] != row['final_loss']


def test_the_curve_does_not_depend_on_where_a_run_was_interrupted(place, monkeypatch, tmp_path):
    "A signal leaves a checkpoint where it comes; drawing thousands of samples from it would answer no question."
    Recorder(monkeypatch, ex, 'score', lambda given: {'fd': given['run'].record['step'], 'protocol': {}})
    monkeypatch.setattr(ex, '_overview', lambda *_: None)
    preset = replace(TINY, train=TINY.train | dict(steps=5, checkpoint_every=2), guidances=(1.,))
    config = TrainConfig(arm='vanilla-linear', **preset.train)
    Trainer(config, LatentDataset(place.root/'latents'), tmp_path/'run').fit(until=3, progress=False)
    row = ex.run_arm(preset, 'vanilla-linear', place.root/'latents', place.reference, tmp_path/'run', progress=False)
    assert [f.name for f in ex.checkpoints(tmp_path/'run')] == [f'step-0000000{n}' for n in (2, 3, 4, 5)]
    assert [p['step'] for p in row['curve']] == [2, 4, 5]


def test_compare_runs_every_arm_under_one_protocol(place, monkeypatch, tmp_path):
    curve = [{'step': 1, 'fid': 9., 'fd': 9.}]

    def verdict(given):
        value = float(len(given['arm']))
        guided = [{'guidance': 1., 'fid': value, 'fd': value}]
        return {'fid': value, 'fd': value, 'accuracy': .5, 'guided': guided, 'final_loss': 1., 'loss_over_power': .5,
                'steps': 2, 'seconds': 1., 'curve': curve, 'protocol': {}}
    tokenizer = load_tokenizer('digits')
    replies = {'prepare_latents': lambda _: tokenizer, 'prepare_reference': lambda _: place.reference,
               'geometry': lambda _: {'report': {'cv': .1}}, 'run_arm': verdict}
    latents, reference, geometry, arms = (Recorder(monkeypatch, ex, name, reply) for name, reply in replies.items())
    monkeypatch.setattr(ex, 'report_html', lambda *_: '')
    report = ex.compare(TINY, tuple(ARMS), tmp_path/'out', seed=6, progress=False)
    assert [c['arm'] for c in arms.calls] == list(ARMS) == list(report['arms'])
    for c in arms.calls:
        assert (c['seed'], c['preset'], c['latents'], c['out']) == (6, TINY, tmp_path/'out'/'latents',
                                                                    tmp_path/'out'/c['arm'])
        assert c['reference'] is place.reference
    for c in (latents.calls[0], reference.calls[0]):
        assert c['preset'] == TINY and c['source'].source == 'digits' and len(c['source']) == 1438
    assert latents.calls[0]['folder'] == tmp_path/'out'/'latents' and geometry.calls[0]['tokenizer'] is tokenizer
    assert {a: pick(r, 'fid', 'fd') for a, r in report['arms'].items()} == {a: len(a) for a in ARMS}
    assert report['environment']['seeds'] == [6]
    assert report['geometry'] == {'cv': .1} and 'vanilla-shell' in (tmp_path/'out'/'table.csv').read_text()


@pytest.mark.parametrize('flip', [True, False])
def test_latents_of_a_comparison_are_the_vanilla_ones(monkeypatch, tmp_path, flip):
    encode = Recorder(monkeypatch, ex, 'encode_latents', lambda _: None)
    preset, source = replace(TINY, train=TINY.train | {'flip': flip}, sampler=Sampler(7, precision='bf16')), ImageSource('digits')
    tokenizer = ex.prepare_latents(preset, source, tmp_path/'latents', progress=False)
    given, = encode.calls
    assert not tokenizer.spherical
    assert given['tokenizer'] is tokenizer
    assert tokenizer.identity == load_tokenizer('digits').identity
    assert given['source'] is source and given['encoding'] == Encoding(flip, precision='bf16')


def test_each_arm_has_its_decoder():
    preset = replace(TINY, tokenizer='a', control='b')
    assert {arm: ex.decoder_name(preset, arm) for arm in ARMS} == {'vanilla-linear': 'b', 'vanilla-shell': 'b',
                                                                   'spherical-linear': 'a', 'spherical-slerp': 'a'}
    assert ex.decoder_name(replace(preset, control=None), 'vanilla-linear') == 'a'


def test_the_overview_has_the_arms_decoder_and_the_strongest_guidance(place, monkeypatch):
    shown = []
    monkeypatch.setattr(ex, 'save_grid', lambda images, path: shown.append(images))
    ex._overview(TINY, 'vanilla-linear', place.root/'vanilla-linear', 2, place.labels, 3)
    model, path, _ = load_run(place.root/'vanilla-linear', 2)
    z = sample(model, path, place.labels[:40], Sampler(7, 'heun', 2.5, (.2, .7), seed=3))
    with torch.no_grad(): want = load_tokenizer('digits-control').decode(z)
    torch.testing.assert_close(shown[0], want, atol=1e-3, rtol=1e-3)


def test_steps_to_reach_by_hand():
    "Halfway in log between 400 and 100 is 200."
    rows = {'vanilla-linear': {'curve': [{'step': 10, 'fid': 900., 'fd': 900.}, {'step': 20, 'fid': 200., 'fd': 200.}]},
            'spherical-slerp': {'curve': [{'step': 10, 'fid': 400., 'fd': 400.},
                                          {'step': 20, 'fid': 100., 'fd': 100.}]},
            'never': {'curve': [{'step': 10, 'fid': 400., 'fd': 400.}]}}
    assert ex.steps_to_reach(rows, 'spherical-slerp') == pytest.approx(15)
    assert ex.steps_to_reach(rows, 'vanilla-linear') == 20 and ex.steps_to_reach(rows, 'never') is None
    assert ex.steps_to_reach(rows, 'spherical-slerp', 'never') == 10


def test_geometry_by_hand():
    images, labels = digits_images('test')
    tokenizer = load_tokenizer('digits')
    found = ex.geometry(tokenizer, images[:100], labels[:100], seed=2)
    z = tokenizer.encode(images[:100])
    torch.testing.assert_close(found['latents'], z, atol=1e-4, rtol=1e-4)
    stats = norm_stats(z)
    for k in ('mean_over_sqrt_d', 'cv'): assert found['report'][k] == pytest.approx(stats[k], rel=1e-4)
    e = found['noise']
    assert abs(e.mean().item()) < .05 and e.std().item() == pytest.approx(1, abs=.05)
    for arm, path in ARMS.items():
        ends = (project(e), project(z)) if path.spherical else (e, z)
        want = path_norms(path.interpolate, *ends, ex.TIMES)
        for k in want: torch.testing.assert_close(found['curves'][arm][k], want[k], atol=1e-3, rtol=1e-3)
    linear = found['report']['radial_share']['linear']
    for t, share in zip((0., .5, 1.), linear):
        assert share == pytest.approx(radial_share(*ARMS['vanilla-linear'].interpolate(e, z, torch.full((100,), t))),
                                      rel=1e-3)
    assert max(found['report']['radial_share']['slerp']) < 1e-6
    anchors, partner = found['pairs']
    assert (labels[anchors] == labels[partner]).all()
    for k, v in found['report']['swap'].items(): assert v == pytest.approx(found['swaps'][k]['pixel'].mean().item())


def test_of_many_images_256_pairs_are_swapped():
    "Of all classes, though images are sorted: decoding is what a report waits for."
    images, labels = digits_images('train')
    order = labels.argsort(stable=True)[:900]
    found = ex.geometry(load_tokenizer('digits'), images[order], labels[order])
    anchors, partner = found['pairs']
    assert len(anchors) == len(found['swaps']['full']['pixel']) == 225 and len(found['latents']) == 900
    assert torch.equal(labels[order][anchors].unique(), labels[order].unique()) and (labels[order][anchors] == labels[order][partner]).all()


def test_a_finetuning_study_swaps_decoders_not_tokens(monkeypatch, tmp_path):
    "Decoders that multiply by 0.9 (spherical) and 0.8 (control), told apart by what they make of both kinds of tokens."
    images = noise(12, 3, 16, 16, scale=.4).clamp(-1, 1)
    start = blocks(scale=2., shift=.1)

    def finetuned(given):
        spherical, run = given['tokenizer'].spherical, given['out']
        run.mkdir(parents=True, exist_ok=True)
        (run/'log.jsonl').write_text('')
        return blocks(spherical, .9 if spherical else .8, scale=2., shift=.1), []
    recorder = Recorder(monkeypatch, studies, 'finetune_decoder', finetuned)
    result = studies.finetune_study(start, images, tmp_path/'out', held_out=images, extractor='none', progress=False)
    assert [c['tokenizer'].spherical for c in recorder.calls] == [True, False]
    whole, projected = F.pixel_unshuffle(images, 2), F.pixel_unshuffle(images, 2)
    projected = (project((projected - .1)*2))/2 + .1

    def quality(z, gain): return psnr((gain*F.pixel_shuffle(z, 2)).clamp(-1, 1), images).mean().item()
    want = {'original': quality(whole, 1.), 'original, projected': quality(projected, 1.),
            'finetuned spherical': quality(projected, .9), 'finetuned control': quality(whole, .8)}
    assert {k: v['psnr'] for k, v in result['pipelines'].items()} == pytest.approx(want, rel=1e-3)
    swap = result['decoder_swap']
    assert swap['spherical tokens, control decoder']['psnr'] == pytest.approx(quality(projected, .8), rel=1e-3)
    assert len({round(v, 3) for v in want.values()}) == 4
    found = swap['vanilla tokens, spherical decoder']['psnr']
    assert found == pytest.approx(quality(projected, .9), rel=1e-3), 'the spherical decoder projects whatever it gets'


def test_analysed_tokens_are_those_of_the_images():
    tokenizer, source, order = load_tokenizer('digits'), ImageSource('digits'), torch.arange(50, 150)
    same, raw, processed = studies.analyze_tokens(tokenizer, source, studies.Analysis(80, batch_size=30), order, progress=False)
    x = digits_images('train')[0][50:130]
    assert same is tokenizer and processed.summary()['images'] == 80
    for found, z in ((raw, tokenizer.raw_latents(x)), (processed, tokenizer.encode(x))):
        want = norm_stats(z)
        for k in ('mean', 'std', 'mean_over_sqrt_d', 'cv', 'min', 'max', 'count'):
            assert found.summary()[k] == pytest.approx(want[k], rel=1e-4), k
    measured, _, standard = studies.analyze_tokens(tokenizer, source, studies.Analysis(80, 'measure', batch_size=30), order,
                                                   progress=False)
    rows = measured.encode(x).movedim(1, -1).flatten(0, -2)
    np.testing.assert_allclose(rows.std(0, unbiased=False), 1, atol=1e-3)
    assert standard.summary()['mean'] == pytest.approx(norm_stats(measured.encode(x))['mean'], rel=1e-4)


def test_evolution_follows_the_samples(place):
    tokenizer, y = load_tokenizer('digits', spherical=True), torch.tensor([3, 1])
    found = studies.evolution(place.root/'spherical-slerp', tokenizer, y, shown=4, steps=6, seed=2)
    model, path, _ = load_run(place.root/'spherical-slerp')
    noise = initial_noise(path, (16, 4, 4), range(2), 2)
    passed = [z for _, z in trajectory(velocity_field(model, path, y), path, noise, Sampler(6).times)]
    z = sample(model, path, y, Sampler(6, seed=2))
    assert found['times'] == pytest.approx([0, 1/3, 2/3, 1])
    with torch.no_grad():
        for k, want in ((1, passed[1]), (3, z)):
            torch.testing.assert_close(found['images'][k], tokenizer.decode(want), atol=1e-3, rtol=1e-3)
    assert found['mean_over_sqrt_d'] == pytest.approx([1.]*4, abs=1e-4)


def test_presets_are_the_papers_where_they_say_so():
    flux = ex.PRESETS['flux2-b2']
    found = flux.tokenizer, flux.image_size, flux.train['model'], flux.samples, flux.extractor
    assert found == ('flux2', 256, 'SiT-B/2', 50_000, 'inception')
    assert flux.train['steps'] == pytest.approx(80*1_281_167/256, abs=10)
    digits = ex.PRESETS['digits']
    found = digits.tokenizer, digits.control, digits.samples, digits.train['flip']
    assert found == ('digits', 'digits-control', 1438, False)
    assert math.isclose(digits.train['steps'], 1200)
