"""A figure belongs to everything it depends on, and to nothing else: keys by content, remembered tokenizers, sides, mixtures, batches."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spherical_lfm.decoder import DecoderTrainer, FinetuneConfig, reconstruction_metrics
from spherical_lfm.engine.features import extract_features, feature_function
from spherical_lfm.engine.images import ImageSource, digits_images
from spherical_lfm.engine.latents import Encoding, LatentDataset, encode_latents
from spherical_lfm.engine.weights import DATA
from spherical_lfm.experiments import PRESETS, prepare_latents, prepare_reference, run_arm
from spherical_lfm.fidelity import (
    Pieces,
    apportion,
    differences,
    generate,
    mixture_of,
    one_side,
    save_npz,
    score_features,
    side_of,
)
from spherical_lfm.paths import SlerpPath, arm_path
from spherical_lfm.sampling import LoadedRun, Sampler, load_run, tokenizer_for
from spherical_lfm.sit import SiT
from spherical_lfm.sphere import project
from spherical_lfm.tokenizers import load_tokenizer
from spherical_lfm.tools import cli
from spherical_lfm.training import TrainConfig, Trainer

TINY = dict(model='SiT-Ti/4', steps=2, batch_size=8, log_every=1, checkpoint_every=2, warmup=0, flip=False)
PRESET = replace(PRESETS['digits'], train=TINY, samples=30, curve_samples=30, sampler=Sampler(1))


def folder_of(images: torch.Tensor, root: Path) -> Path:
    "Images as a flat folder."
    root.mkdir(parents=True)
    for n, x in enumerate(images): Image.fromarray(((x[0] + 1)*127.5).round().byte().numpy()).save(root/f'{n:03d}.png')
    return root


def encoded(out: Path, tokenizer='digits', order=None, **options) -> Path:
    encode_latents(load_tokenizer(tokenizer), ImageSource('digits', split='test'), out, Encoding(**{'flip': False} | options), order, progress=False)
    return out


@pytest.fixture(scope='module')
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = SiT.from_name('SiT-Ti/4', input_size=4, in_channels=16, num_classes=10).requires_grad_(False)
        for p in net.parameters(): p += .05*torch.randn(p.shape)
    return net


# --- keys ---

def test_an_evaluation_belongs_to_decoder_weights_and_reference(tmp_path):
    "The same folder with another control, other weights or another reference gives other figures, and those kept are not returned."
    source = ImageSource('digits', split='test')
    prepare_latents(PRESET, source, tmp_path/'latents', progress=False)
    reference = prepare_reference(PRESET, source, tmp_path, progress=False)
    run = lambda preset, reference, out='run': run_arm(preset, 'vanilla-linear', tmp_path/'latents', reference, tmp_path/out, curve=False, progress=False)
    first = run(PRESET, reference)
    assert run(PRESET, reference)['fd'] == first['fd']
    stamp = (tmp_path/'run'/'evaluation.json').stat().st_mtime_ns
    run(PRESET, reference)
    assert (tmp_path/'run'/'evaluation.json').stat().st_mtime_ns == stamp, 'what is the same is kept'
    other = replace(PRESET, control=str(DATA/'digits'/'vanilla'))
    assert run(other, reference)['fd'] == run(other, reference, 'fresh')['fd'] != first['fd']
    less = reference | {'mu': reference['mu'] + 1, 'content': 'less'}
    assert run(PRESET, less)['fd'] != first['fd']
    changed = replace(PRESET, train=TINY | {'lr': 1.})
    shutil.rmtree(tmp_path/'run'/'checkpoints')
    assert run(changed, reference)['fd'] == run(changed, reference, 'changed')['fd'] != first['fd'], 'retrained weights in the same folder'


def test_reference_and_latents_of_folders_with_one_name(tmp_path):
    images = digits_images('train')[0]
    preset = replace(PRESET, image_size=16)
    found = []
    for where, first in (('one', 0), ('two', 100)):
        source = ImageSource(folder_of(images[first:first + 24], tmp_path/where/'train'), 16)
        prepare_latents(preset, source, tmp_path/'latents', progress=False)
        found.append((prepare_reference(preset, source, tmp_path, progress=False)['features'], LatentDataset(tmp_path/'latents', resident=True).z['z'], source))
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])
    want = extract_features(torch.stack([x for x, _ in found[1][2]]), 'digits')
    torch.testing.assert_close(found[1][0], want[found[1][2].shuffled(0)])


def test_resume_on_other_latents_is_refused(tmp_path):
    fit = lambda latents, steps: Trainer(TrainConfig(**TINY | {'steps': steps}), LatentDataset(latents, project=project), tmp_path/'run').fit(progress=False)
    fit(encoded(tmp_path/'a'), 2)
    for n, options in enumerate((dict(flip=True), dict(dtype='bf16'), dict(order=torch.arange(358, -1, -1)))):
        with pytest.raises(ValueError, match='cannot resume .*data content: '): fit(encoded(tmp_path/f'other{n}', **options), 4)
    fit(encoded(tmp_path/'same', shard_size=4096), 4)


def test_finetuning_on_other_images_is_refused(tmp_path):
    images, config = digits_images('train')[0], dict(batch_size=4, perceptual='none', log_every=1)
    fit = lambda x, steps: DecoderTrainer(load_tokenizer('digits'), x, FinetuneConfig(steps=steps, **config), tmp_path/'run').fit(progress=False)
    fit(images[:20], 1)
    with pytest.raises(ValueError, match='cannot resume .*images fingerprint: '): fit(images[20:40], 2)
    fit(images[:20], 2)


def test_features_of_other_weights_are_not_reused(net, tmp_path):
    tokenizer, y = load_tokenizer('digits', spherical=True), torch.arange(20) % 10
    make = lambda identity, scale: generate(tmp_path/'f', LoadedRun(_Scaled(net, scale), SlerpPath(), {'weights': identity}), tokenizer, y, 'digits', Sampler(2), pieces=Pieces(progress=False))['features']
    a = make('a', 1.)
    assert torch.equal(make('a', 5.), a), 'the identity is what counts'
    assert not torch.equal(make('b', 5.), a)


class _Scaled(torch.nn.Module):
    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale, self.config = net, scale, net.config

    def forward(self, z, t, y): return self.scale*self.net(z, t, y)


def test_the_record_of_weights_changes_with_them(tmp_path):
    data = LatentDataset(encoded(tmp_path/'z'), project=project)
    weights = []
    for steps in (2, 4):
        Trainer(TrainConfig(**TINY | {'steps': steps}), data, tmp_path/'run').fit(progress=False)
        weights += [load_run(tmp_path/'run')[2]['weights'], load_run(tmp_path/'run', weights='raw')[2]['weights']]
    assert len(set(weights)) == 4 and load_run(tmp_path/'run')[2]['weights'] == weights[2]


# --- a run remembers its tokenizer ---

def test_samples_are_decoded_by_the_tokenizer_that_was_encoded_with(tmp_path):
    tuned = load_tokenizer('digits', spherical=True)
    for p in tuned.autoencoder.decoder.parameters(): p.data.mul_(1.02)
    tuned.save_pretrained(tmp_path/'tuned')
    for arm, out in (('spherical-slerp', 'run'), ('vanilla-linear', 'vanilla')):
        data = LatentDataset(encoded(tmp_path/'z', tmp_path/'tuned'), project=arm_path(arm).projection)
        Trainer(TrainConfig(arm=arm, **TINY), data, tmp_path/out).fit(progress=False)
    record = load_run(tmp_path/'run')[2]
    assert tokenizer_for(record).identity == tuned.identity != load_tokenizer('digits', spherical=True).identity
    assert tokenizer_for(record, 'digits').identity == load_tokenizer('digits', spherical=True).identity, 'one that is given is taken'
    with pytest.warns(UserWarning, match='never saw projected tokens'): tokenizer_for(record, DATA/'digits'/'vanilla')
    with pytest.raises(ValueError, match='finetuned for projected tokens.*give the control'): tokenizer_for(load_run(tmp_path/'vanilla')[2])
    assert tokenizer_for(load_run(tmp_path/'vanilla')[2], 'digits-control').identity == load_tokenizer('digits-control').identity
    for p in tuned.autoencoder.decoder.parameters(): p.data.mul_(1.02)
    tuned.save_pretrained(tmp_path/'tuned')
    with pytest.raises(ValueError, match='has changed since the latents .* --tokenizer'): tokenizer_for(record)
    shutil.move(tmp_path/'tuned', tmp_path/'away')
    with pytest.raises(FileNotFoundError, match='is not there any more: give it with --tokenizer'): tokenizer_for(record)


def test_short_runs_do_not_sample_their_initialisation(tmp_path):
    "Six hundred steps under the default average of ten thousand: of the first weights nothing is left."
    from spherical_lfm.training import average_decay
    left = np.prod([average_decay(.9999, t) for t in range(600)])
    assert left < 1e-18 and average_decay(.9999, 10**6) == .9999 and average_decay(.5, 0) == .1
    trainer = Trainer(TrainConfig(**TINY | {'lr': .1}), LatentDataset(encoded(tmp_path/'z'), project=project), tmp_path/'run')
    first = trainer.weights[0].clone()
    trainer.train_step()
    torch.testing.assert_close(trainer.ema[0], .1*first + .9*trainer.weights[0])


# --- sides and mixtures ---

def test_sets_of_different_sides_are_refused(tmp_path, capsys):
    images = digits_images('test')[0][:40]
    save_npz([((images + 1)*127.5).byte().permute(0, 2, 3, 1).numpy()], torch.zeros(40), tmp_path/'small.npz')
    folder_of(torch.nn.functional.interpolate(images, scale_factor=2), tmp_path/'large')
    Image.new('L', (20, 24)).save(folder_of(images[:2], tmp_path/'mixed')/'odd.png')
    assert (side_of(str(tmp_path/'small.npz')), side_of(str(tmp_path/'large')), side_of('digits'), side_of(str(tmp_path/'mixed'), 8)) == (16, 32, 16, 8)
    with pytest.raises(ValueError, match='not squares of one size .*give --size'): side_of(str(tmp_path/'mixed'))
    with pytest.raises(ValueError, match='a has 16 px; b has 32 px: give sets of one size'): one_side({'a': 16, 'b': 32, 'c': None})
    with pytest.raises(SystemExit, match='small.npz has 16 px; .*large has 32 px'): cli.slfm_evaluate([str(tmp_path/'small.npz'), str(tmp_path/'large'), '--extractor', 'digits'])
    cli.slfm_evaluate([str(tmp_path/'small.npz'), 'digits', '--extractor', 'digits', '--out', str(tmp_path/'a.json')])
    assert json.loads((tmp_path/'a.json').read_text())['protocol']['side'] == 16


def test_apportioning():
    for counts, total, want in (([1, 1, 1], 10, [4, 3, 3]), ([700, 200, 100], 10, [7, 2, 1]), ([5, 0, 5], 3, [2, 0, 1]), ([1, 999], 10, [0, 10])):
        assert torch.bincount(apportion(counts, total), minlength=len(counts)).tolist() == want
    assert torch.equal(apportion([3, 5], 50), apportion([3, 5], 50))
    with pytest.raises(ValueError, match='choose the mixture equal'): apportion([0, 0], 5)


def test_classes_of_a_score(tmp_path):
    images, labels = digits_images('test')
    for n in range(40):
        (tmp_path/'real'/str(int(n < 30))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(((images[n, 0] + 1)*127.5).byte().numpy()).save(tmp_path/'real'/str(int(n < 30))/f'{n}.png')
    record = {'classes': 10, 'data': {'source': {'classes': {str(k): 10*(k + 1) for k in range(10)}}}}
    real = ImageSource(tmp_path/'real', 16)
    shares = lambda *args: (lambda y, name: (torch.bincount(y, minlength=10).tolist(), name))(*mixture_of(record, *args))
    assert shares(real, 20) == ([5, 15] + [0]*8, 'reference')
    assert shares(None, 55) == (list(range(1, 11)), 'training') == shares(real, 55, 'training')
    assert shares(real, 20, 'equal') == ([2]*10, 'equal')
    assert mixture_of({'classes': 2, 'data': {'source': {}}}, None, 4)[1] == 'equal'
    with pytest.raises(ValueError, match='mixture must be'): mixture_of(record, None, 4, 'same')
    a = {'mixture': 'equal', 'reference': 'x', 'reference_content': '1'}
    assert differences(a, a | {'mixture': 'training'}) == ['mixture: equal against training']
    assert not differences(a, a | {'reference': 'moved/x'}) and differences(a, a | {'reference_content': '2'}) == ['reference: x against x']


# --- batches, shards ---

def test_scores_do_not_depend_on_batches_or_shards(net, tmp_path):
    "People have seen rFID move from 1.9 to 4.0 with the batch size: here only sums are regrouped."
    tokenizer, y, real = load_tokenizer('digits', spherical=True), torch.arange(50) % 10, digits_images('test')[0]
    reference = extract_features(real, 'digits', parts=('features', 'logits'))
    scored = []
    for n, (batch, decode, shard) in enumerate(((50, 50, 50), (7, 64, 1000), (50, 3, 11), (1, 1, 50))):
        found = generate(tmp_path/str(n), LoadedRun(net, SlerpPath(), {'weights': ''}), tokenizer, y, 'digits', Sampler(3, seed=3), pieces=Pieces(shard, batch, decode, False))
        scored.append(score_features(found, reference, extractor='digits'))
    for other in scored[1:]: assert other == pytest.approx(scored[0], rel=1e-3, abs=1e-5)
    some, extract = real[:61], feature_function('digits')
    values = [reconstruction_metrics(tokenizer, some, extract, batch_size=b) for b in (61, 60, 7, 1)]
    for v in values[1:]: assert v == pytest.approx(values[0], rel=1e-3)
    features = [extract_features(some, 'digits', b) for b in (61, 60, 7, 1)]
    for f in features[1:]: torch.testing.assert_close(f, features[0], atol=1e-4, rtol=1e-4)
    assert score_features(scored and {'features': features[0]}, reference, ('kid',)) == score_features({'features': features[0]}, reference, ('kid',)), 'subsets of KID do not move'


def test_extractors_run_in_float32(tmp_path):
    x = digits_images('test')[0][:16]
    plain = extract_features(x, 'digits')
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(extract_features(x, 'digits'), plain)


def test_arms_side_by_side_are_those_in_turn(tmp_path):
    from spherical_lfm.experiments import compare
    arms, preset = ('vanilla-linear', 'spherical-slerp'), replace(PRESET, samples=20, curve_samples=20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1) # as each of the two has
    one, two = (compare(preset, arms, tmp_path/str(n), 'digits', progress=False, workers=n)['arms'] for n in (1, 2))
    torch.set_num_threads(threads)
    for arm in arms: assert two[arm]['fd'] == one[arm]['fd'] and two[arm]['final_loss'] == one[arm]['final_loss']
    assert [json.loads(line)['loss'] for line in (tmp_path/'2'/arms[0]/'log.jsonl').read_text().splitlines()]
